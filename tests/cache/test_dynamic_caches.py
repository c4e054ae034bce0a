"""A user's `DynamicCache` lives in pages for the length of a call, and shows what stock would show afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import SAMPLING, run
from tests.tools.models import CORE, OLD, assert_fast, padded_batch, pair, pair_with_graphs, real_tokens, single, tiny

FAMILIES = [*CORE, "qwen3_next"]


def assert_same_cache(ours: DynamicCache, theirs: DynamicCache, mask: torch.Tensor | None = None) -> None:
    """Layers of the same types with the same contents, but for what the mask `[B, columns]` hides."""
    assert type(ours) is type(theirs) and len(ours.layers) == len(theirs.layers)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
        names = [name for name in ("keys", "values", "conv_states", "recurrent_states") if hasattr(b, name)]
        for name in names:
            x, y = getattr(a, name), getattr(b, name)
            x, y = (x[0], y[0]) if isinstance(y, dict) else (x, y)
            assert x.shape == y.shape and x.dtype == y.dtype
            if mask is not None and name in ("keys", "values"):
                shown = mask[:, -x.shape[2] :].bool()
                x, y = x.transpose(1, 2)[shown], y.transpose(1, 2)[shown]
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        for name, value in vars(b).items():
            if isinstance(value, bool | int):
                assert getattr(a, name) == value, name


def grown(mask: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {**SAMPLING, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_dynamic_cache_becomes_pages(family: str, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    theirs, ours = DynamicCache(config=stock.config), DynamicCache(config=model.config)
    expected = run(stock, batch, 24, **{CACHE: theirs}, **options, return_dict_in_generate=True)
    result = run(model, batch, 24, **{CACHE: ours}, **options, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected.sequences)
    assert result[CACHE] is ours and expected[CACHE] is theirs
    assert_fast(model, real_tokens(batch))
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    mask = batch["attention_mask"].repeat_interleave(copies, 0)
    assert_same_cache(ours, theirs, grown(mask, theirs.get_seq_length()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_over_a_dynamic_cache(family: str, rows: int) -> None:
    stock, model = pair(family)
    caches = [DynamicCache(config=stock.config), DynamicCache(config=model.config)]
    ids, mask = padded_batch(rows)["input_ids"], padded_batch(rows)["attention_mask"]
    for turn in range(3):
        turns = [
            run(side, {"input_ids": ids, "attention_mask": mask}, 12, **{CACHE: cache})
            for side, cache in zip((stock, model), caches, strict=True)
        ]
        assert torch.equal(turns[1], turns[0])
        # The last token of an answer was not fed to the model, and comes with the next message.
        assert_fast(model, real_tokens(padded_batch(rows)) if not turn else 12 * rows)
        assert_same_cache(caches[1], caches[0], grown(mask, caches[0].get_seq_length()))
        message = padded_batch(1, 11, turn + 2)["input_ids"].expand(rows, -1)
        ids = torch.cat([turns[0], message], 1)
        mask = grown(mask, ids.shape[1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", CORE)
def test_a_prefix_that_stock_computed(family: str, rows: int) -> None:
    """Also its padding comes back as it was, and columns that only this call hides."""
    stock, model = pair(family)
    system = padded_batch(rows)
    caches = []
    for _ in range(2):
        caches.append(DynamicCache(config=stock.config))
        with torch.no_grad():
            stock(**system, **{CACHE: caches[-1]})
    question = padded_batch(1, 11, 3)["input_ids"].expand(rows, -1)
    mask = grown(system["attention_mask"], 48)
    mask[:, :30] = 0
    batch = {"input_ids": torch.cat([system["input_ids"], question], 1), "attention_mask": mask}
    expected = run(stock, batch, 12, **{CACHE: caches[0]})
    assert torch.equal(run(model, batch, 12, **{CACHE: caches[1]}), expected)
    assert_fast(model, 11 * rows)
    assert_same_cache(caches[1], caches[0])


@pytest.mark.parametrize("family", CORE)
def test_a_dynamic_cache_without_a_config(family: str) -> None:
    """Its layers have no windows; where the model's have, stock goes on with it."""
    stock, model = pair(family)
    theirs, ours = DynamicCache(), DynamicCache()
    expected = run(stock, padded_batch(), 24, **{CACHE: theirs})
    assert torch.equal(run(model, padded_batch(), 24, **{CACHE: ours}), expected)
    assert_same_cache(ours, theirs, grown(padded_batch()["attention_mask"], 60))
    if family == "qwen2_window":
        call = hf_fastattn.report(model).last_call
        assert call.forwards == 0 and call.fallbacks and all("DynamicCache" in reason for reason in call.fallbacks)
    else:
        assert_fast(model)


def test_layers_of_different_lengths_stay_the_users() -> None:
    stock, model = pair("llama")
    caches = [DynamicCache(config=stock.config) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            stock(**single(), **{CACHE: cache})
        for name in ("keys", "values"):
            setattr(cache.layers[1], name, getattr(cache.layers[1], name)[:, :, 4:])
    ids = {"input_ids": torch.cat([single()["input_ids"], single(3, 3)["input_ids"]], 1)[:, :38]}
    expected = run(stock, ids, 8, **{CACHE: caches[0]})
    assert torch.equal(run(model, ids, 8, **{CACHE: caches[1]}), expected)
    assert_same_cache(caches[1], caches[0])
    call = hf_fastattn.report(model).last_call
    assert call.forwards == 0 and all("different numbers" in reason for reason in call.fallbacks)


class Watch(StoppingCriteria):
    """Looks at the user's cache after every token, and fails at one."""

    def __init__(self, cache: Any, step: int | None, error: type[BaseException]) -> None:
        self.cache, self.left, self.error = cache, step, error
        self.seen: list[tuple[int, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append((self.cache.get_seq_length(), round(float(self.cache.layers[0].keys[:, :, -1].sum()), 2)))
        if len(self.seen) == self.left:
            raise self.error
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 5, None])
@pytest.mark.parametrize("family", CORE)
def test_what_the_users_cache_shows_meanwhile_and_after_a_failure(family: str, step: int | None, error: Any) -> None:
    stock, model = pair(family)
    seen, caches = [], []
    for side in (stock, model):
        caches.append(DynamicCache(config=stock.config))
        watch = Watch(caches[-1], step, error)
        options = {CACHE: caches[-1], "stopping_criteria": StoppingCriteriaList([watch])}
        if step is None:
            run(side, padded_batch(), 8, **options)
        else:
            with pytest.raises(error):
                run(side, padded_batch(), 8, **options)
        seen.append(watch.seen)
    assert seen[1] == seen[0]
    assert_fast(model)
    assert_same_cache(caches[1], caches[0], grown(padded_batch()["attention_mask"], caches[0].get_seq_length()))
    # It goes on from there, with the other model too.
    more = {"input_ids": torch.ones(3, 50, dtype=torch.long), "attention_mask": grown(padded_batch()["attention_mask"], 50)}
    assert torch.equal(run(stock, more, 6, **{CACHE: caches[1]}), run(model, more, 6, **{CACHE: caches[0]}))


@pytest.mark.parametrize("filled", [False, True])
def test_a_full_pool_leaves_the_users_cache_as_it_was(filled: bool) -> None:
    stock, model = pair("llama", {"memory_limit": 20_000})
    cache = DynamicCache(config=stock.config)
    if filled:
        with torch.no_grad():
            stock(**single(100), **{CACHE: cache})
    before = copy.deepcopy(cache)
    with pytest.raises(hf_fastattn.CacheFullError, match="memory_limit=20000"):
        run(model, single(101), 4, **{CACHE: cache})
    assert_same_cache(cache, before) if filled else None
    assert cache.get_seq_length() == (100 if filled else 0)
    assert hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("family", CORE)
def test_assisted_decoding_with_a_dynamic_cache(family: str) -> None:
    if OLD and family == "qwen2_window":
        pytest.skip("stock loses keys when it crops a full window in this version")
    stock, model = pair(family)
    theirs, ours = DynamicCache(config=stock.config), DynamicCache(config=model.config)
    expected = run(stock, single(), 24, **{CACHE: theirs}, prompt_lookup_num_tokens=3)
    assert torch.equal(run(model, single(), 24, **{CACHE: ours}, prompt_lookup_num_tokens=3), expected)
    assert_fast(model)
    assert_same_cache(ours, theirs)


def test_a_call_leaves_no_pages_beside_the_users_keys() -> None:
    """Memory: the user's tensors are gone while pages hold their content, and the other way round."""
    _, model = pair("llama")
    cache = DynamicCache(config=model.config)
    run(model, single(200), 4, **{CACHE: cache})
    assert hf_fastattn.report(model).page_bytes_allocated == 0
    old = [layer.keys.data_ptr() for layer in cache.layers]
    held: list[int] = []

    class Look(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            paged = model._fastattn.runtime._calls[-1].lent[0]
            held.extend(layer.keys is None for layer in paged._layers)
            return torch.zeros(1, dtype=torch.bool)

    more = {"input_ids": single(210)["input_ids"]}
    run(model, more, 2, **{CACHE: cache}, stopping_criteria=StoppingCriteriaList([Look()]))
    assert held and all(held) and len(old) == 3
    assert_fast(model)


# ---- conversions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_dynamic_and_to_dynamic(family: str, rows: int) -> None:
    stock, model = pair(family)
    first = padded_batch(rows)
    dynamic = DynamicCache(config=stock.config)
    with torch.no_grad():
        stock(**first, **{CACHE: dynamic})
    paged = hf_fastattn.PagedCache.from_dynamic(dynamic, model.config, mask=first["attention_mask"])
    assert_same_cache(paged.to_dynamic(), dynamic)
    before = copy.deepcopy(dynamic)
    question = padded_batch(1, 11, 3)["input_ids"].expand(rows, -1)
    mask = grown(first["attention_mask"], 48)
    batch = {"input_ids": torch.cat([first["input_ids"], question], 1), "attention_mask": mask}
    tokens = run(model, batch, 12, **{CACHE: paged})
    assert_fast(model, 11 * rows, held=None)
    assert_same_cache(dynamic, before)
    assert torch.equal(tokens, run(stock, batch, 12, **{CACHE: dynamic}))
    assert_same_cache(paged.to_dynamic(), dynamic, grown(mask, 59))


def test_from_dynamic_refuses_what_it_cannot_hold() -> None:
    llama, window = tiny("llama").config, tiny("qwen2_window").config
    with pytest.raises(ValueError, match="layer 1"):
        hf_fastattn.PagedCache.from_dynamic(DynamicCache(config=llama), window)
    with pytest.raises(TypeError, match="list"):
        hf_fastattn.PagedCache.from_dynamic([], llama)  # type: ignore[arg-type]


# ---- PEFT's prefix tuning, which passes a filled cache --------------------------------------------------------


def prefix_tuned(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "prompt_encoder" in name:
                    parameter.normal_(0, 1)
    return tuned.eval()


OPTIONS: list[dict[str, Any]] = [{}, {"num_beams": 3}, {**SAMPLING, "num_return_sequences": 2}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [single, padded_batch])
@pytest.mark.parametrize("family", CORE)
def test_prefix_tuning(family: str, batch: Callable[[], Any], options: dict[str, Any]) -> None:
    stock, model = prefix_tuned(tiny(family)), prefix_tuned(tiny(family))
    hf_fastattn.patch(model)
    expected = run(stock, batch(), 12, **options)
    assert torch.equal(run(model, batch(), 12, **options), expected)
    call = hf_fastattn.report(model).last_call
    if family == "qwen2_window":
        # PEFT's cache has no windows, or the padding between prefix and prompt is counted by them.
        assert call.forwards or call.fallbacks
    else:
        assert_fast(model)
        assert call.prompt_tokens == real_tokens(batch())


def test_dynamic_cache_in_a_replayed_loop() -> None:
    stock, model = pair_with_graphs("llama")
    theirs, ours = DynamicCache(config=stock.config), DynamicCache(config=model.config)
    processors = LogitsProcessorList([])
    for side, cache in ((stock, theirs), (model, ours)):
        run(side, padded_batch(), 12, **{CACHE: cache}, logits_processor=processors)
    assert_same_cache(ours, theirs, grown(padded_batch()["attention_mask"], 48))
    assert_fast(model)
