"""Assisted decoding: guesses of an assistant, of early layers, of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from tests.generation.calls import SAMPLING, run
from tests.tools.combinations import pairwise
from tests.tools.models import CORE, OLD, assert_fast, noisy, pair, single, tiny


@pytest.mark.parametrize(("family", "sampling", "patched_assistant"), pairwise(CORE, [False, True], [False, True]))
def test_assisted(family: str, sampling: bool, patched_assistant: bool) -> None:
    if family == "qwen2_window" and OLD and not patched_assistant:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    stock, model = pair(family)
    assistant = noisy(tiny(family))
    if patched_assistant:
        hf_fastattn.patch(assistant)
    tokens = run(model, single(), 48, assistant_model=assistant, **(SAMPLING if sampling else {}))
    if not sampling:
        expected = run(stock, single(), 48)
    elif family == "qwen2_window" and OLD:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    else:
        expected = run(stock, single(), 48, assistant_model=noisy(tiny(family)), **SAMPLING)
    assert torch.equal(tokens, expected)
    call = assert_fast(model)
    # Some guesses were right, some were not.
    assert 4 < call.forwards < 48
    if patched_assistant:
        assert_fast(assistant)


@pytest.mark.parametrize("family", CORE)
def test_assistant_that_is_always_wrong(family: str) -> None:
    stock, model = pair(family)
    assistant = tiny(family, seed=9)
    if family == "qwen2_window" and OLD:
        # Stock's own cache could not be cropped.
        hf_fastattn.patch(assistant)
    tokens = run(model, single(), 48, assistant_model=assistant)
    assert torch.equal(tokens, run(stock, single(), 48))
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
def test_assistant_early_exit(family: str) -> None:
    stock, model = pair(family)
    tokens = run(model, single(), 32, assistant_early_exit=2)
    assert torch.equal(tokens, run(stock, single(), 32))
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("sampling", [False, True])
def test_prompt_lookup(family: str, sampling: bool) -> None:
    stock, model = pair(family)
    text = single(13)["input_ids"].repeat(1, 3)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    options: dict[str, Any] = dict(SAMPLING) if sampling else {}
    if family == "qwen2_window" and OLD and sampling:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    tokens = run(model, batch, 48, prompt_lookup_num_tokens=4, **options)
    if sampling:
        options["prompt_lookup_num_tokens"] = 4
    assert torch.equal(tokens, run(stock, batch, 48, **options))
    assert_fast(model)


@pytest.mark.parametrize("drafts", ["prompt", "assistant"])
@pytest.mark.parametrize("family", ["llama", "qwen3_omni_moe"])
def test_a_prompt_with_padding_behind_it(family: str, drafts: str) -> None:
    """Transformers reads the logits of its last column, in the forward that computes the first drafts, too."""
    stock, model = pair(family)
    batch = single(16)
    batch["attention_mask"][:, -7:] = 0
    options = {"prompt_lookup_num_tokens": 2} if drafts == "prompt" else {"assistant_model": noisy(tiny(family))}
    for seed in range(4):
        batch["input_ids"] = (single(16, seed)["input_ids"] % 5 + 1) * batch["attention_mask"]
        assert torch.equal(run(model, batch, 8, **options), run(stock, batch, 8, **options))
        reasons = hf_fastattn.report(model).last_call.fallbacks
        assert list(reasons) == ["the mask hides a column whose logits are read"]


def test_no_layer_drafts() -> None:
    """Which Transformers lets be, and then restores the configuration."""
    stock, model = pair("llama")
    assert torch.equal(run(model, single(), 8, assistant_early_exit=0), run(stock, single(), 8, assistant_early_exit=0))
    assert model.config.num_hidden_layers == stock.config.num_hidden_layers == 3
    assert torch.equal(run(model, single(), 8), run(stock, single(), 8))
    assert_fast(model)
