"""A first call of a new size compiles all that its prompt, its steps and their choice launch at once, and nothing else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import JITFunction

import hf_fastattn
from hf_fastattn.cache import prefix_groups
from hf_fastattn.eval.accuracy import reexecuted
from hf_fastattn.kernels import rehearsal
from hf_fastattn.patches.fused import rehearse
from tests.tools.fake_driver import counting_driver
from tests.tools.models import tiny
from tests.tools.targets import TARGETS

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing")
PROMPTS, SAMPLES, LENGTH = 2, 32, 200
# (number of the rehearsal, or 0 outside of one; kernel)
Compiled = list[tuple[int, str]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """What is compiled for a GPU that is not there; launches do nothing, so that tokens are arbitrary."""
    found: Compiled = []
    begun = 0
    ahead, compile_kernel = rehearsal.rehearsal, JITFunction._do_compile

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        nonlocal begun
        begun += 1
        with ahead():
            yield

    def noted(self: JITFunction, *given: Any, **options: Any) -> Any:
        found.append((begun if rehearsal.is_under_way() else 0, self.fn.__name__))
        return compile_kernel(self, *given, **options)

    monkeypatch.setattr(rehearsal, "DEVICES", ("cpu",))
    monkeypatch.setattr(rehearsal, "rehearsal", counted)
    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    monkeypatch.setattr(reexecuted, "IN_TORCH", ())
    monkeypatch.setattr(prefix_groups, "WORTH_BYTES", 1)
    # All modules that ask for the backend, those that are imported by the first call among them.
    model = hf_fastattn.patch(tiny("llama").eval(), cuda_graphs=True)
    model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)
    for name, module in tuple(sys.modules.items()):
        if name.startswith("hf_fastattn.") and hasattr(module, "choose_backend"):
            monkeypatch.setattr(module, "choose_backend", lambda *given: ("triton", None))
    with counting_driver(TARGETS["sm_90"]), reexecuted.reexecuted_loop():
        yield found


def generate(family: str = "llama", repeats: int = 1, variant: hf_fastattn.Variant | None = None, **options: Any) -> Any:
    model = hf_fastattn.patch(tiny(family).bfloat16().eval(), cuda_graphs=True, backend="triton", variant=variant)
    ids = torch.randint(3, 100, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).repeat_interleave(repeats, 0)
    common: dict[str, Any] = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, attention_mask=torch.ones_like(ids), **{**common, **options})
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_replayed == 8 and not call.fallbacks
    return call


def assert_at_once(compiled: Compiled, *wanted: str) -> None:
    assert {number for number, _ in compiled} == {1}, compiled
    assert {name for _, name in compiled} >= set(wanted)


def test_greedy(compiled: Compiled) -> None:
    generate()
    assert_at_once(compiled, "short_row_kernel", "greedy_chunk_kernel", "advance_kernel")
    assert all(name != "split_kv_kernel" for _, name in compiled)


def test_samples_of_prompts(compiled: Compiled) -> None:
    """Steps have more rows than the prompt, and read what these share once."""
    call = generate(repeats=SAMPLES, do_sample=True)
    assert call.prompt_tokens == PROMPTS * LENGTH
    assert_at_once(compiled, "prefixes_kernel", "suffix_kernel", "draw_kernel", "advance_kernel")


def test_a_penalty(compiled: Compiled) -> None:
    generate(repetition_penalty=1.2, min_new_tokens=2, eos_token_id=7)
    assert_at_once(compiled, "greedy_chunk_kernel")


def test_a_mask(compiled: Compiled) -> None:
    """The tiles that it shows are listed for steps whose page tables are as wide as the loop's."""
    generate(variant=hf_fastattn.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < 64) | (kv_idx < 4)))
    assert_at_once(compiled, "visited_kernel", "split_kv_kernel")


def test_without_what_is_rehearsed_besides(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(rehearse, "_shared", lambda *given: None)
    generate(repeats=SAMPLES, do_sample=True)
    assert {number for number, _ in compiled} != {1}
