"""Layers walked by PyTorch where our kernels do not run: rounded as Transformers rounds them, other modules called."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_fastattn
from hf_fastattn.kernels.layer.reference import rms_norm
from hf_fastattn.patches.families.llama import FAMILIES
from hf_fastattn.patches.fused.plain_products import PlainProducts
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import run
from tests.tools.models import assert_fast, padded_batch, pair, tiny

LAYERS = 3
NAMES = FAMILIES[0].layers
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of our operations."""
    counts: Counter[str] = Counter()

    def counting(name: str, own: Any) -> Any:
        return lambda self, *given: (counts.update([name]), own(self, *given))[1]

    for name in ("norm", "gated", "call"):
        monkeypatch.setattr(PlainProducts, name, counting(name, getattr(PlainProducts, name)))
    return counts


def hidden(model: Any, paged: bool, autocast: bool = False) -> Tensor:
    """States of a prompt and of two steps."""
    batch = padded_batch(3, 12)
    ids = batch["input_ids"].clamp(min=1)
    cache = hf_fastattn.PagedCache(model.config) if paged else None
    around = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    found = []
    with torch.no_grad(), around:
        for begin, end in ((0, 10), (10, 11), (11, 12)):
            out = model.model(ids[:, begin:end], **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            found.append(out.last_hidden_state)
    return torch.cat(found, 1)


def without_attention(model: Any) -> Any:
    """Attention rounds as it sums, which is not what is compared here."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "autocast"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)])
def test_all_but_attention_is_the_same_number(name: str, dtype: torch.dtype, autocast: bool, walked: Counter[str]) -> None:
    stock, model = (without_attention(tiny(name)).to(dtype) for _ in range(2))
    found = hidden(hf_fastattn.patch(model), True, autocast)
    # Nothing was called but what attention asks for.
    assert dict(walked) == {"norm": 3 * (2 * LAYERS + 1), "gated": 3 * LAYERS}
    assert torch.equal(found, hidden(stock, False, autocast))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    norm = tiny("llama").model.norm.to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        x, delta = (torch.randn(5, norm.weight.numel()).to(dtype) for _ in range(2))
        assert NAMES is not None
        got, total = PlainProducts(NAMES, (5,)).norm(norm, x, delta)
        assert torch.equal(total, x + delta)
        assert torch.equal(got, norm(total)) and torch.equal(got, rms_norm(total, norm.weight, norm.variance_epsilon))


def test_what_is_not_plain_is_called(walked: Counter[str]) -> None:
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"))
    seen: list[tuple[int, ...]] = []
    for changed in (stock, model):
        layer = changed.model.layers[1]
        layer.mlp.up_proj.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)) or 2 * out)
        layer.mlp.act_fn = nn.GELU()
    torch.testing.assert_close(hidden(model, True), hidden(stock, False), rtol=1e-4, atol=1e-4)
    assert walked["call"] == 3 * 2
    # Hooks see the columns of the batch.
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and seen[0][:2] == (3, 10)


def test_a_hook_on_a_layer_runs_transformers_layers(walked: Counter[str]) -> None:
    model = hf_fastattn.patch(tiny("llama"))
    model.model.layers[0].register_forward_hook(lambda *given: None)
    hidden(model, True)
    assert not walked


def test_an_activation_that_is_a_function() -> None:
    stock, model = pair("llama")
    for one in (stock, model):
        mlp = one.model.layers[0].mlp
        del mlp.act_fn
        mlp.act_fn = torch.tanh
    assert torch.equal(run(model, padded_batch(), 8), run(stock, padded_batch(), 8))
    assert_fast(model)
