"""Batch-invariant mode calls layers and `lm_head` as Transformers wrote them: only attention and the cache are ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional

import hf_fastattn
from hf_fastattn.patches.fused.forward import calls_layers, fused_reason
from hf_fastattn.transformers_version import CACHE
from tests.tools.fused_layers import assert_logits, build, count_launches
from tests.tools.models import padded_batch, tiny
from tests.tools.reexecuted import reexecuted_loop

PRODUCTS_OF_A_LAYER = 7


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often PyTorch's product of a linear layer is computed."""
    counts: Counter[str] = Counter()
    linear = functional.linear

    def counted(*arguments: Any) -> torch.Tensor:
        counts["linear"] += 1
        return linear(*arguments)

    monkeypatch.setattr(functional, "linear", counted)
    return counts


@pytest.mark.interpreter
def test_no_product_is_ours(monkeypatch: pytest.MonkeyPatch, products: Counter[str]) -> None:
    stock, model = build("llama"), hf_fastattn.patch(build("llama"), batch_invariant=True)
    assert calls_layers(model.model) and "batch_invariant=True" in (fused_reason(model.model) or "")
    launched, layers = count_launches(monkeypatch), model.config.num_hidden_layers
    ids, mask = padded_batch(3, 12).values()
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        products.clear()
        with torch.no_grad():
            outs.append(model(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True).logits)
        assert products["linear"] == PRODUCTS_OF_A_LAYER * layers + 1 and not launched
    call = hf_fastattn.report(model).last_call
    assert call.forwards == 3 and not call.fallbacks
    assert_logits("llama", stock, torch.cat(outs, 1), ids, mask, [9, 10, 12])


@pytest.mark.interpreter
def test_nor_in_the_devices_loop(monkeypatch: pytest.MonkeyPatch, products: Counter[str]) -> None:
    stock, options = build("llama"), {**padded_batch(3, 12), "max_new_tokens": 5, "do_sample": False}
    wanted = stock.generate(**options)
    with reexecuted_loop():
        model = hf_fastattn.patch(build("llama"), batch_invariant=True, cuda_graphs=True)
        launched = count_launches(monkeypatch)
        products.clear()
        assert torch.equal(model.generate(**options), wanted)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and not call.fallbacks and not launched
    # A prompt and at least four steps; a step is run once more when it is recorded.
    assert products["linear"] >= 5 * (PRODUCTS_OF_A_LAYER * model.config.num_hidden_layers + 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_experts_and_hybrids_stay_fused(family: str) -> None:
    """Steps of theirs could not be recorded otherwise."""
    model = hf_fastattn.patch(tiny(family), batch_invariant=True)
    assert not calls_layers(model.model) and "batch_invariant" not in (fused_reason(model.model) or "")


@pytest.mark.interpreter
def test_off_by_default() -> None:
    assert not calls_layers(hf_fastattn.patch(build("llama")).model)
