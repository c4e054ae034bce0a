"""A paged cache as an object: pickled, copied, iterated, its keys read and replaced, its model cast or gone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import run
from tests.tools.combinations import pairwise
from tests.tools.fresh import fresh
from tests.tools.models import CORE, WINDOW, assert_fast, padded_batch, pair, single, tiny


def through_pickle(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def through_torch_save(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
    "to_dynamic and back": lambda cache: hf_fastattn.PagedCache.from_dynamic(cache.to_dynamic(), cache._config),
}


def prompt_and_more(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A prompt, and the prompt with a question behind it."""
    first = padded_batch(rows)
    question = padded_batch(1, 11, 3)["input_ids"].expand(rows, -1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(question)], 1)
    return first, {"input_ids": torch.cat([first["input_ids"], question], 1), "attention_mask": mask}


def prefilled(model: Any, batch: dict[str, torch.Tensor], cache: Any) -> Any:
    with torch.no_grad():
        model(**batch, **{CACHE: cache})
    return cache


@pytest.mark.parametrize(("family", "how", "rows"), pairwise([*CORE, "qwen3_next"], list(COPIES), [1, 3]))
def test_a_copy_goes_on_as_the_original(family: str, rows: int, how: str) -> None:
    stock, model = pair(family)
    first, more = prompt_and_more(rows)
    theirs = prefilled(stock, first, DynamicCache(config=stock.config))
    cache = prefilled(model, first, hf_fastattn.PagedCache(model.config))
    made = COPIES[how](cache)
    assert isinstance(made, hf_fastattn.PagedCache) and made.get_seq_length() == 37
    expected = run(stock, more, 12, **{CACHE: theirs})
    assert torch.equal(run(model, more, 12, **{CACHE: made}), expected)
    call = assert_fast(model, 11 * rows, held=None)
    assert call.forwards == 12
    # The original was left alone.
    assert cache.get_seq_length() == 37
    assert torch.equal(run(model, more, 12, **{CACHE: cache}), expected)
    assert_fast(model, 11 * rows, held=None)


@pytest.mark.parametrize("family", CORE)
def test_a_pickled_cache_is_loaded_without_the_model(family: str, tmp_path: Path) -> None:
    stock, model = pair(family)
    cache = prefilled(model, single(), hf_fastattn.PagedCache(model.config))
    file = tmp_path / "cache.pt"
    torch.save(cache, file)
    code = (
        f"import torch; cache = torch.load({str(file)!r}, weights_only=False); print(cache.get_seq_length(), "
        f"[tuple(layer.keys.shape) for layer in cache.layers]); torch.save(cache, {str(file)!r})"
    )
    length, shapes = fresh(code).split(" ", 1)
    theirs = prefilled(stock, single(), DynamicCache(config=stock.config))
    assert length == "37" and shapes == str([tuple(layer.keys.shape) for layer in theirs.layers])
    _, more = prompt_and_more(1)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(model, more, 12, **{CACHE: loaded}), run(stock, more, 12, **{CACHE: theirs}))
    assert_fast(model, 11, held=None)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("end", ["unpatched", "deleted"])
def test_a_copy_after_the_model_is_gone(end: str, how: str) -> None:
    stock, model = pair("qwen2_window")
    first, more = prompt_and_more(3)
    cache = prefilled(model, first, hf_fastattn.PagedCache(model.config))
    theirs = prefilled(stock, first, DynamicCache(config=stock.config))
    if end == "unpatched":
        hf_fastattn.unpatch(model)
    del model
    gc.collect()
    made = COPIES[how](cache)
    expected = run(stock, more, 12, **{CACHE: theirs})
    # An unpatched model runs on the cache, too.
    assert torch.equal(run(stock, more, 12, **{CACHE: made}), expected)


@pytest.mark.parametrize("family", CORE)
def test_iterated_and_indexed_as_a_dynamic_cache(family: str) -> None:
    stock, model = pair(family)
    theirs = prefilled(stock, single(), DynamicCache(config=stock.config))
    ours = prefilled(model, single(), hf_fastattn.PagedCache(model.config))
    assert len(ours) == len(theirs)
    for (keys, values, window), (k, v, w) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(keys, k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, v, rtol=1e-4, atol=1e-4)
        assert window == w
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length() and a.is_initialized == b.is_initialized
        assert a.device == b.device and a.get_mask_sizes(3) == b.get_mask_sizes(3) and a.is_sliding == b.is_sliding
    assert hasattr(ours, "__getitem__") == hasattr(theirs, "__getitem__")
    assert torch.equal(DynamicCache(ours, config=model.config).layers[1].keys, ours.layers[1].keys)


def compress(cache: Any, kept: list[int]) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, kept]
        layer.values = layer.values[:, :, kept]


def go_on(model: Any, cache: Any, mask: torch.Tensor | None, steps: int = 8) -> torch.Tensor:
    """Logits of a few steps by hand, at the positions that the tokens would have without compression."""
    ids = torch.randint(1, 100, (cache.layers[0].keys.shape[0], steps), generator=torch.Generator().manual_seed(7))
    logits = []
    with torch.no_grad():
        for step in range(steps):
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = torch.full((len(ids), 1), 37 + step)
            out = model(ids[:, step : step + 1], position_ids=positions, attention_mask=mask, **{CACHE: cache})
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_of_all_layers_are_replaced(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    kept = list(range(0, 37, 2))
    mask = batch["attention_mask"][:, kept]
    theirs = prefilled(stock, batch, DynamicCache(config=stock.config))
    ours = prefilled(model, batch, hf_fastattn.PagedCache(model.config))
    for cache in (theirs, ours):
        compress(cache, kept)
    assert ours.get_seq_length() == theirs.get_seq_length() == len(kept)
    forwards = hf_fastattn.report(model).last_call.forwards
    expected = go_on(stock, theirs, mask)
    torch.testing.assert_close(go_on(model, ours, mask), expected, rtol=1e-3, atol=1e-3)
    assert assert_fast(model, held=None).forwards == forwards + 8
    assert ours.get_seq_length() == theirs.get_seq_length()
    # And generate() goes on from there.
    batch = {"input_ids": torch.ones(rows, 30, dtype=torch.long), "attention_mask": torch.ones(rows, 30, dtype=torch.long)}
    batch["attention_mask"][:, : len(kept)] = mask
    assert torch.equal(run(model, batch, 8, **{CACHE: ours}), run(stock, batch, 8, **{CACHE: theirs}))
    assert_fast(model, held=None)


@pytest.mark.parametrize("rows", [1, 3])
def test_keys_behind_a_window_are_replaced(rows: int) -> None:
    """Rounded, as by a quantiser: a layer with a window must keep its number of tokens."""
    stock, model = pair("qwen2_window")
    batch = padded_batch(rows)
    theirs = prefilled(stock, batch, DynamicCache(config=stock.config))
    ours = prefilled(model, batch, hf_fastattn.PagedCache(model.config))
    for cache in (theirs, ours):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys * 0.5, layer.values * 2
    mask = batch["attention_mask"]
    torch.testing.assert_close(go_on(model, ours, mask), go_on(stock, theirs, mask), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)
    assert ours.tables[WINDOW].rows[0][0] < 0


@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_layers_of_different_lengths_run_on_dense_layers(family: str) -> None:
    stock, model = pair(family)
    theirs = prefilled(stock, single(20), DynamicCache(config=stock.config))
    ours = prefilled(model, single(20), hf_fastattn.PagedCache(model.config))
    for cache in (theirs, ours):
        layer = cache.layers[2]
        layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
    # Three tokens later the window is full, where stock fails: its mask has more columns than there are keys.
    expected = go_on(stock, theirs, None, 3)
    assert torch.equal(go_on(model, ours, None, 3), expected)
    call = hf_fastattn.report(model).last_call
    assert sum(call.fallbacks.values()) == 3 and all("number" in reason for reason in call.fallbacks)
    assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in theirs.layers]


def test_keys_replaced_during_the_forward() -> None:
    """A hook after each attention, which reads what was just written and keeps half of it."""
    stock, model = pair("llama")
    caches = {id(stock): DynamicCache(config=stock.config), id(model): hf_fastattn.PagedCache(model.config)}
    for side in (stock, model):
        cache = caches[id(side)]

        def halve(module: Any, args: Any, output: Any, cache: Any = cache) -> None:
            layer = cache.layers[module.layer_idx]
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

        hooks = [layer.self_attn.register_forward_hook(halve) for layer in side.model.layers]
        prefilled(side, single(), cache)
        for hook in hooks:
            hook.remove()
    ours, theirs = caches[id(model)], caches[id(stock)]
    assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in theirs.layers]
    torch.testing.assert_close(go_on(model, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


# ---- options, crops, casts ------------------------------------------------------------------------------------


def test_a_cache_made_by_hand_takes_the_models_options() -> None:
    model = hf_fastattn.patch(tiny("llama"), page_size=4, memory_limit=200_000)
    cache = hf_fastattn.PagedCache(model.config)
    prefilled(model, single(), cache)
    assert cache.groups.page_size == 4 and len(cache.tables[None].rows[0]) == 10
    assert hf_fastattn.report(model).pages_in_use == 10
    with pytest.raises(hf_fastattn.CacheFullError, match="memory_limit=200000"):
        run(model, single(37), 300, **{CACHE: hf_fastattn.PagedCache(model.config)})
    own = prefilled(model, single(), hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(page_size=8)))
    assert own.groups.page_size == 8
    # Emptied, it goes with the next model.
    cache.reset()
    other = hf_fastattn.patch(tiny("llama"), page_size=2)
    assert prefilled(other, single(), cache).groups.page_size == 2
    assert hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_a_second_crop_never_reads_released_pages(page_size: int) -> None:
    stock, model = pair("qwen2_window", {"page_size": page_size})
    ids = single(60)["input_ids"]
    cache = hf_fastattn.PagedCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :45], **{CACHE: cache})
        cache.crop(-1)
        if page_size < 16:
            with pytest.raises(RuntimeError, match="window"):
                cache.crop(-5)
        else:
            cache.crop(-1)
        length = cache.get_seq_length()
        ours = model(ids[:, length:], **{CACHE: cache}).logits
        torch.testing.assert_close(ours, stock(ids).logits[:, length:], rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)
    # One crop a forward is what recording is for.
    cache.crop(-9)
    assert cache.get_seq_length() == 51


CASTS = {"wider": torch.float64, "narrower": torch.float16}


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("family", CORE)
def test_a_cast_model_and_the_cache_of_before(family: str, how: str) -> None:
    stock, model = pair(family)
    held = []
    for side in (stock, model):
        out = run(side, padded_batch(2), 12, return_dict_in_generate=True)
        side.to(CASTS[how])
        held.append(out)
    batch = {
        "input_ids": torch.cat([held[0].sequences, held[0].sequences[:, -5:]], 1),
        "attention_mask": torch.cat([padded_batch(2)["attention_mask"], torch.ones(2, 17, dtype=torch.long)], 1),
    }
    # A new call with a new cache, while the old one is alive.
    assert torch.equal(run(model, batch, 8), run(stock, batch, 8))
    assert_fast(model)
    old = held[1][CACHE]
    if how == "narrower":
        with pytest.raises(RuntimeError):
            run(stock, batch, 8, **{CACHE: held[0][CACHE]})
        with pytest.raises(ValueError, match=r"float32.*float16"):
            run(model, batch, 8, **{CACHE: old})
        assert old.get_seq_length() == 37 + 11
        return
    assert torch.equal(run(model, batch, 8, **{CACHE: old}), run(stock, batch, 8, **{CACHE: held[0][CACHE]}))
    # One forward widens the keys, and pages take them from there.
    call = assert_fast(model, fallbacks=("float32",), held=None)
    assert sum(call.fallbacks.values()) == 1 and call.forwards == 7
    assert {layer.keys.dtype for layer in old.layers} == {torch.float64}


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99, 1.0])
def test_a_share_of_the_pages_is_kept(keep: float) -> None:
    stock, model = pair("qwen2_window", {"keep_memory": keep, "page_size": 4})
    expected = run(stock, padded_batch(), 24)
    assert torch.equal(run(model, padded_batch(), 24), expected)
    groups = model._fastattn.runtime.groups
    most = {group.window: groups._largest.get(group.window, group.pool.capacity) for group in groups}
    for group in groups:
        assert group.pool.capacity == int(most[group.window] * keep)
        assert group.storage.capacity == group.pool.capacity
        for keys, values in group.storage._pages.values():
            assert keys.untyped_storage().nbytes() == keys.nbytes and len(keys) == len(values) == group.pool.capacity
    kept = groups.nbytes
    # A call that needs less leaves as much, and one that needs as much finds its way again.
    run(model, single(9), 4)
    assert groups.nbytes == kept
    assert torch.equal(run(model, padded_batch(), 24), expected)
    assert_fast(model)
