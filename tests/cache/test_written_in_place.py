"""Keys and values of a cache written in place, as in a layer of Transformers, where they are what the cache holds."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.cache import cache_state, dense_cache
from hf_fastattn.cache.shown_states import Shown, ShownStates
from hf_fastattn.transformers_version import CACHE
from tests.cache.test_cache_object import go_on, prefilled, through_pickle
from tests.generation.calls import run
from tests.tools.combinations import pairwise
from tests.tools.models import CORE, assert_fast, padded_batch, pair, single


def steer_last_value(cache: Any) -> None:
    for layer in cache.layers:
        layer.values[:, :, -1] += 0.7


def zero_some_keys(cache: Any) -> None:
    cache.layers[1].keys[:, 1, -5:-2].zero_()


def write_to_views(cache: Any) -> None:
    """Of tensors that were read before, and of which others are dropped meanwhile."""
    held = [layer.keys[..., -4:, :] for layer in cache.layers]
    gc.collect()
    for states in held:
        states.mul_(-1)


def write_through_what_is_read_twice(cache: Any) -> None:
    first = cache.layers[0].values
    cache.layers[0].values[:, :, -3] *= 2
    first[:, :, -3] += 1


def write_before_and_after_another_is_replaced(cache: Any) -> None:
    held = cache.layers[1].values
    cache.layers[1].values[:, :, -2] += 1
    cache.layers[0].keys = cache.layers[0].keys * 0.5
    held[:, :, -1] -= 1


def write_in_inference_mode(cache: Any) -> None:
    with torch.inference_mode():
        cache.layers[0].keys[:, :, -1] *= 3
        cache.layers[1].values[:, :, -1].add_(1)


def write_and_crop(cache: Any) -> None:
    steer_last_value(cache)
    cache.crop(-1)
    zero_some_keys(cache)


def write_and_reorder(cache: Any) -> None:
    steer_last_value(cache)
    rows = cache.layers[0].keys.shape[0]
    cache.reorder_cache(torch.arange(rows - 1, -1, -1))


WAYS: dict[str, Callable[[Any], None]] = {
    write.__name__: write
    for write in (
        steer_last_value, zero_some_keys, write_to_views, write_through_what_is_read_twice,
        write_before_and_after_another_is_replaced, write_in_inference_mode, write_and_reorder,
    )
}  # fmt: skip


def both(family: str, batch: dict[str, torch.Tensor]) -> tuple[Any, Any, Any, Any]:
    stock, model = pair(family)
    theirs = prefilled(stock, batch, DynamicCache(config=stock.config))
    return stock, model, theirs, prefilled(model, batch, hf_fastattn.PagedCache(model.config))


@pytest.mark.parametrize(("family", "way", "rows"), pairwise(CORE, list(WAYS), [1, 3]))
def test_written_in_place(family: str, way: str, rows: int) -> None:
    batch = padded_batch(rows)
    mask = batch["attention_mask"]
    stock, model, theirs, ours = both(family, batch)
    unwritten = go_on(stock, copy.deepcopy(theirs), mask)
    for cache in (theirs, ours):
        WAYS[way](cache)
    if way == "write_and_reorder":
        mask = mask.flip(0)
    forwards = hf_fastattn.report(model).last_call.forwards
    expected = go_on(stock, theirs, mask)
    assert not torch.allclose(expected, unwritten, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(go_on(model, ours, mask), expected, rtol=1e-3, atol=1e-3)
    assert assert_fast(model, held=None).forwards == forwards + 8
    more = torch.ones(rows, mask.shape[1] + 20, dtype=torch.long)
    given = {"input_ids": more, "attention_mask": more.clone()}
    given["attention_mask"][:, : mask.shape[1]] = mask
    assert torch.equal(run(model, given, 8, **{CACHE: ours}), run(stock, given, 8, **{CACHE: theirs}))
    assert_fast(model, held=None)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_written_cropped_and_written(family: str) -> None:
    stock, model, theirs, ours = both(family, single())
    for cache in (theirs, ours):
        write_and_crop(cache)
    torch.testing.assert_close(go_on(model, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


@pytest.mark.parametrize("made", [copy.deepcopy, through_pickle, lambda cache: cache.to_dynamic()])
def test_a_copy_has_what_was_written(made: Callable[[Any], Any]) -> None:
    stock, _, theirs, ours = both("llama", single())
    for cache in (theirs, ours):
        steer_last_value(cache)
    torch.testing.assert_close(go_on(stock, made(ours), None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)


def test_written_and_read_by_another_model() -> None:
    stock, _, theirs, ours = both("llama", single())
    for cache in (theirs, ours):
        zero_some_keys(cache)
    torch.testing.assert_close(go_on(stock, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)


def test_what_was_read_before_a_forward_is_nobodys_after_it() -> None:
    stock, model, theirs, ours = both("llama", single())
    held = [(cache, cache.layers[0].keys) for cache in (theirs, ours)]
    results = [go_on(side, cache, None, 1) for side, cache in ((stock, theirs), (model, ours))]
    for _, keys in held:
        keys.zero_()
    results += [go_on(side, cache, None, 4) for side, cache in ((stock, theirs), (model, ours))]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[3], results[2], rtol=1e-3, atol=1e-3)


def test_pages_that_others_share_are_as_before() -> None:
    """A prompt kept for later calls, and a fork of the cache."""
    stock, model = pair("llama", {"prefix_cache": True})
    expected = run(stock, single(), 8)
    assert torch.equal(run(model, single(), 8), expected)
    out = model.generate(**single(), max_new_tokens=8, return_dict_in_generate=True, do_sample=False)
    cache = out[CACHE]
    fork = copy.deepcopy(cache)
    before = fork.layers[0].keys.clone()
    steer_last_value(cache)
    for layer in cache.layers:
        layer.keys.mul_(0.5)
    go_on(model, cache, None, 2)
    assert torch.equal(fork.layers[0].keys, before)
    assert torch.equal(run(model, single(), 8), expected)
    assert_fast(model, held=None)


def test_reading_alone_keeps_no_copy() -> None:
    """Layers read one after the other, as to store them, take the memory of one."""
    _, model, _, ours = both("llama", single())
    shown: ShownStates = ours._shown
    for layer in ours.layers:
        assert layer.keys.shape == layer.values.shape
        assert len(shown) == 1
    kept = [layer.keys for layer in ours.layers]
    assert len(shown) == len(kept)
    assert all(keys is layer.keys for keys, layer in zip(kept, ours.layers, strict=True))
    del kept
    assert not shown.now(ours.lengths) and not shown and ours.dense is None
    go_on(model, ours, None)
    assert_fast(model, held=None)
    assert shown._state is None


def test_tensors_that_somebody_has_are_told_apart() -> None:
    shown = Shown((torch.zeros(3, 4), torch.zeros(3, 4)))
    assert not shown.is_held
    held = shown.states[0]
    assert shown.is_held
    del held
    assert not shown.is_held
    view = shown.states[1][:1]
    assert shown.is_held and not shown.is_written
    view += 1
    del view
    assert not shown.is_held and shown.is_written


@pytest.mark.parametrize("rows", [1, 3])
def test_a_search_goes_on_from_what_was_written(rows: int) -> None:
    """Rows of a fork, cut and continued, whose padding stays padding."""
    batch = padded_batch(rows)
    stock, model, theirs, ours = both("llama", batch)
    steer_last_value(theirs)
    steer_last_value(ours)
    theirs.reorder_cache(torch.tensor([rows - 1] * rows))
    fork = hf_fastattn.fork(ours, [rows - 1] * rows)
    steer_last_value(fork)
    steer_last_value(theirs)
    theirs.crop(-2)
    hf_fastattn.truncate(fork, 35)
    zero_some_keys(fork)
    zero_some_keys(theirs)
    new = single(5)["input_ids"].expand(rows, -1)
    mask = torch.cat([batch["attention_mask"][[rows - 1] * rows, :35], torch.ones_like(new)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 35:]
    with torch.no_grad():
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        expected = stock(**given, **{CACHE: theirs}).logits
    torch.testing.assert_close(hf_fastattn.append(model, fork, new, logits_to_keep=0), expected, rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


def replace_another(cache: Any) -> None:
    cache.layers[0].values = cache.layers[0].values * 1.0


def write_and(goes_on: Callable[[Any], Any]) -> Callable[[Any], None]:
    def write(cache: Any) -> None:
        cache.layers[0].keys[:, :, 3] *= -1
        goes_on(cache)

    return write


@pytest.mark.parametrize(
    "first",
    [
        replace_another,
        write_and(copy.deepcopy),
        write_and(through_pickle),
        write_and(lambda cache: copy.deepcopy(cache.layers[2])),
        write_and(lambda cache: cache.crop(0)),
    ],
)
def test_what_was_read_is_written_later(first: Callable[[Any], None]) -> None:
    """Tensors that somebody has had since before the cache went over to layers of Transformers."""
    stock, model, theirs, ours = both("llama", single())
    for cache in (theirs, ours):
        held = [layer.keys for layer in cache.layers]
        first(cache)
        held[1][:, :, -3:] *= -1
    torch.testing.assert_close(go_on(model, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


@pytest.mark.parametrize("first", [lambda cache: None, steer_last_value])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.arange(3)),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_select_indices(torch.arange(3)),
    ],
)
def test_what_was_read_before_a_change(change: Callable[[Any], Any], first: Callable[[Any], None]) -> None:
    """A crop leaves views, which count; a selection makes copies, beside which what was read does not."""
    batch = {"input_ids": padded_batch()["input_ids"]}
    stock, model, theirs, ours = both("llama", batch)
    for cache in (theirs, ours):
        held = cache.layers[0].keys
        first(cache)
        change(cache)
        held[:, :, 5] *= -3
    torch.testing.assert_close(go_on(model, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


def test_what_is_read_can_be_viewed_in_another_shape() -> None:
    _, _, theirs, ours = both("llama", single())
    for cache in (theirs, ours):
        cache.layers[0].keys.view(1, 2, -1)[:, 0].zero_()
    torch.testing.assert_close(ours.layers[0].keys, theirs.layers[0].keys, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["CacheState._fit_tables", "read_layers"])
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_an_interrupt_loses_nothing_that_was_written(monkeypatch: pytest.MonkeyPatch, family: str, place: str) -> None:
    stock, model, theirs, ours = both(family, single())
    for cache in (theirs, ours):
        cache.layers[0].values[:, :, -3:] *= -1
    owner, name = (cache_state.CacheState, "_fit_tables") if "." in place else (dense_cache, place)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        pickle.dumps(ours)
    torch.testing.assert_close(go_on(model, ours, None), go_on(stock, theirs, None), rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)
