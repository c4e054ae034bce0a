"""The patched models on a CUDA device: fp32 tokens equal to stock, 16-bit logits within the error criterion."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_fastattn
from tests.models import FAMILIES, assert_fast, padded_batch, pair, real_tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_equal_stock(family: str, beams: int) -> None:
    stock, model = (m.to("cuda") for m in pair(family))
    batch = {name: value.to("cuda") for name, value in padded_batch().items()}
    options = {"max_new_tokens": 64, "do_sample": False, "num_beams": beams}
    assert torch.equal(model.generate(**batch, **options), stock.generate(**batch, **options))
    assert_fast(model, real_tokens(batch), shared=beams > 1)
    assert hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_one_prompt(family: str) -> None:
    stock, model = (m.to("cuda") for m in pair(family))
    ids = padded_batch()["input_ids"][:1].to("cuda")
    options = {"max_new_tokens": 32, "do_sample": True, "num_return_sequences": 8}
    outputs = []
    for candidate in (stock, model):
        torch.manual_seed(3)
        outputs.append(candidate.generate(ids, **options))
    assert torch.equal(*outputs)
    assert_fast(model, ids.numel(), shared=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits(family: str, dtype: torch.dtype) -> None:
    # At the usual weight scale: at 0.3 the logits of these models overflow what 16 bits can tell apart.
    stock, model = (m.to("cuda") for m in pair(family, initializer_range=0.05))
    ids = torch.randint(3, 128, (2, 100), device="cuda")
    with torch.no_grad():
        want = stock(ids).logits.double()
        plain = copy.deepcopy(stock).to(dtype)(ids).logits.double()
        model.to(dtype)
        cache = hf_fastattn.PagedCache(model.config)
        parts = [model(ids[:, :90], past_key_values=cache, use_cache=True).logits]
        for column in range(90, 100):
            parts.append(model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits)
    ours = torch.cat(parts, 1).double()
    assert hf_fastattn.report(model).last_call.forwards == 11
    assert (ours - want).abs().max() <= 2 * (plain - want).abs().max()
