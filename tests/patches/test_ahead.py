"""What is compiled when a model is patched is what its prompts launch."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import hf_fastattn
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.kernels import rehearsal
from hf_fastattn.kernels.attention.paged import paged_attention
from hf_fastattn.kernels.rehearsal import noted
from hf_fastattn.patches.attention import ahead
from hf_fastattn.stream_layout import Streaming
from tests.tools.fake_driver import counting_driver
from tests.tools.models import tiny
from tests.tools.targets import TARGETS

BF16, CPU = torch.bfloat16, torch.device("cpu")


def keys_of(run: Any) -> list[str]:
    """Triton's keys of what is launched."""
    return [key for key, _ in rehearsal._asked_for(noted(run))]


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "page"), [(32, 8, 128, 16), (16, 8, 128, 16), (14, 2, 64, 32), (8, 1, 256, 16)]
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_kernel_of_prompts(heads: int, groups: int, dim: int, page: int, dtype: torch.dtype) -> None:
    """Of any length and number of rows, whose queries lie within a projection."""
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=groups)
    module = SimpleNamespace(config=config, head_dim=dim, scaling=dim**-0.5)
    with counting_driver(TARGETS["sm_90"]):
        first, kernel = keys_of(lambda: ahead._attend(module, CPU, dtype, page))
        for rows, tokens, columns in ((1, 300, 40), (3, 512, 37), (8, 1024, 64)):
            projected = torch.zeros(rows * tokens, heads + 2 * groups, dim, dtype=dtype)
            k_pages, v_pages = torch.zeros(2, 5, page, groups, dim, dtype=dtype)
            begins, lengths = torch.arange(rows + 1).int() * tokens, torch.full((rows,), tokens).int()
            table = torch.zeros(rows, columns, dtype=torch.int32)

            options: dict[str, Any] = {"max_query_len": tokens, "scale": dim**-0.5, "hopper": True, "work_lists": {}}
            arguments = (projected[:, :heads], k_pages, v_pages, table, begins, lengths)
            found = keys_of(functools.partial(paged_attention, *arguments, **options))
            assert len(found) == 2 and found[1] == kernel and kernel != first, (rows, tokens)


def attentions_of(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def test_which_models_have_one() -> None:
    plain, config = attentions_of(tiny("llama")), FastAttnConfig()
    assert ahead._attends_to_all(plain, BF16, config) is plain[0]
    assert ahead._attends_to_all(plain, torch.float32, config) is None
    assert ahead._attends_to_all(plain, BF16, FastAttnConfig(kv_dtype="int8")) is None
    assert ahead._attends_to_all(plain, BF16, FastAttnConfig(streaming=Streaming(4, 64))) is None
    assert ahead._attends_to_all(attentions_of(tiny("mistral", sliding_window=32)), BF16, config) is None


def test_nothing_is_begun_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "compile_behind", None)
    monkeypatch.setattr(rehearsal, "identify_compiler", None)
    hf_fastattn.unpatch(hf_fastattn.patch(tiny("llama").to(BF16)))


def test_a_fault_is_none_of_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ahead, "_attend", fails)
    ahead._begin(None, CPU, BF16, 16)
    assert rehearsal.can_rehearse()
