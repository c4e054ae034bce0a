"""What else a user does with a model works on a patched one: hooks, dtypes, compilation, single forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import (
    DynamicCache,
)

import hf_fastattn
from hf_fastattn.patches.attention import forward as attention
from hf_fastattn.transformers_version import CACHE
from tests.patches.snapshots import assert_patched_equals, generate, snapshot
from tests.tools.models import CORE, assert_fast, padded_batch, pair, real_tokens, tiny


class Count(ModelHook):
    """Counts the forwards that it sees."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("cached", [False, True])
def test_layers_of_no_cache_of_ours_do_no_more_than_before(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    called: list[Any] = []
    monkeypatch.setattr(attention, "call_original", lambda *given, **kwargs: called.append(given))
    with torch.no_grad():
        ours, theirs = (
            one(**padded_batch(), use_cache=cached, **({CACHE: DynamicCache(config=one.config)} if cached else {})).logits
            for one in (model, stock)
        )
    assert torch.equal(ours, theirs) and not called
    # A cache of ours, even one given by position, is not by-passed.
    layer, states = model.model.layers[0].self_attn, torch.zeros(1, 4, model.config.hidden_size)
    embeddings = model.model.rotary_emb(states, torch.arange(4)[None])
    layer(states, embeddings, None, hf_fastattn.PagedCache(model.config))
    assert len(called) == 1


@pytest.mark.parametrize("everywhere", [False, True])
def test_accelerate_hooks_are_kept(everywhere: bool) -> None:
    stock, model, hook = tiny("llama"), tiny("llama"), Count()
    for name, module in model.named_modules():
        if everywhere or name.endswith("self_attn"):
            add_hook_to_module(module, hook)
    before = snapshot(model)
    hf_fastattn.patch(model)
    hook.calls = 0
    assert torch.equal(generate(model), generate(stock))
    # Somebody's own hook: it sees the batch as stock shows it.
    assert_fast(model, fallbacks=("padding stays: a ",))
    assert hook.calls >= 3 * 16
    hf_fastattn.unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(generate(model), generate(stock))


def test_accelerate_hook_added_after_the_patch() -> None:
    stock, model = pair("llama")
    hook = Count()
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, hook)
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model, fallbacks=("padding stays: a ",))
    assert hook.calls >= 3 * 16
    hf_fastattn.unpatch(model)
    hook.calls = 0
    assert torch.equal(generate(model), generate(stock)) and hook.calls >= 3 * 16
    for layer in model.model.layers:
        remove_hook_from_module(layer.self_attn)
    assert torch.equal(generate(model), generate(stock))


@pytest.mark.parametrize("patch_first", [False, True])
def test_hooks_that_only_move_tensors_change_nothing(patch_first: bool) -> None:
    stock, model = tiny("llama"), tiny("llama")
    if patch_first:
        hf_fastattn.patch(model)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    if not patch_first:
        hf_fastattn.patch(model)
    assert_patched_equals(stock, model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("paged", [False, True])
def test_hidden_states_of_a_forward(family: str, paged: bool) -> None:
    stock, model = pair(family)
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        expected = stock(**padded_batch(), output_hidden_states=True)
        cache = hf_fastattn.PagedCache(model.config) if paged else None
        ours = model(**padded_batch(), output_hidden_states=True, **{CACHE: cache})
    assert len(ours.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    if paged:
        assert_fast(model, held=None)


@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([30, 36])])
def test_logits_to_keep(keep: Any) -> None:
    stock, model = pair("llama")
    with torch.no_grad():
        expected = stock(**padded_batch(), logits_to_keep=keep).logits
        cache = hf_fastattn.PagedCache(model.config)
        ours = model(**padded_batch(), logits_to_keep=keep, **{CACHE: cache}).logits
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours[:, -1], expected[:, -1], rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


@pytest.mark.parametrize("family", CORE)
def test_inference_mode_and_no_grad_take_turns(family: str) -> None:
    stock, model = pair(family)
    # With options of its own it has pages of its own.
    cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig())
    tokens, mask = padded_batch()["input_ids"], padded_batch()["attention_mask"]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_patched_equals(stock, model)
            tokens = model.generate(
                tokens.clone(),
                attention_mask=mask.clone(),
                max_new_tokens=9,
                do_sample=False,
                **{CACHE: cache},
            )
            assert_fast(model, held=None)
        grown = tokens.shape[1] - mask.shape[1]
        mask = torch.cat([mask, torch.ones(3, grown, dtype=mask.dtype)], 1)
    assert torch.equal(tokens, generate(stock, 27))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moved_to_another_dtype_after_the_patch(dtype: torch.dtype) -> None:
    stock, model = pair("qwen2_window")
    generate(model)
    stock.to(dtype)
    model.to(dtype)
    if dtype == torch.float64:
        assert_patched_equals(stock, model)
    else:
        assert generate(model).shape == (3, 37 + 16)
        assert_fast(model, real_tokens(padded_batch()))


def test_attention_implementation_may_be_switched() -> None:
    stock, model = pair("llama")
    for name in ("eager", "sdpa"):
        stock.set_attn_implementation(name)
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert_patched_equals(stock, model)


def test_compile_of_a_patched_model() -> None:
    stock, model = pair("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")
    cache = hf_fastattn.PagedCache(model.config)
    theirs = DynamicCache(config=stock.config)
    ids = padded_batch(2)["input_ids"].clamp_min(1)
    with torch.no_grad():
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:32]):
            ours = compiled(part, **{CACHE: cache}).logits
            expected = stock(part, **{CACHE: theirs}).logits
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)
    torch.compiler.reset()


def test_base_model_of_a_patched_model() -> None:
    """`model.model(...)`, as reward and embedding code calls it."""
    stock, model = pair("qwen2")
    assert isinstance(model.model, type(stock.model))
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        expected = stock.model(**padded_batch()).last_hidden_state
        ours = model.model(**padded_batch()).last_hidden_state
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-3, atol=1e-3)
