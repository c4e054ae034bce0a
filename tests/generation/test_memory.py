"""What a call holds: the pages that it needs, made once before the prompt, or in small steps where its rows may end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.loop import decode_loop
from hf_fastattn.pages import reach
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.pages.reach import tokens_ahead
from hf_fastattn.patches.decoder import chunked_prefill
from hf_fastattn.transformers_version import CACHE
from tests.pages.test_page_storage import Live
from tests.tools.models import VOCAB, assert_fast, padded_batch, pair_with_graphs, real_tokens, single, tiny
from tests.tools.peak_bytes import PeakBytes
from tests.tools.reexecuted import reexecuted_loop

SIZE, NEW = 4, 40
ENDS = {"eos_token_id": VOCAB - 1}


class Unchanged(LogitsProcessor):
    """A user's own, so that Transformers' own loop runs."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


OWN = {"logits_processor": LogitsProcessorList([Unchanged()])}
LOOPS: dict[str, dict[str, Any]] = {"device": {}, "transformers": OWN}


@pytest.fixture(autouse=True)
def captured_on_the_cpu() -> Iterator[None]:
    with reexecuted_loop():
        yield


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    return Live(monkeypatch)


def run(model: Any, new: int = NEW, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**{**padded_batch(), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs})


def pages_for(lengths: list[int]) -> int:
    return sum(-(-length // SIZE) for length in lengths)


def assert_equal(family: str = "llama", new: int = NEW, **kwargs: Any) -> tuple[Any, Any]:
    """Patched as stock; returns the page groups, and the counters of the call."""
    stock, model = pair_with_graphs(family, {"page_size": SIZE})
    assert torch.equal(run(model, new, **kwargs), run(stock, new, **kwargs))
    call = assert_fast(model)
    assert call.graphs_replayed >= call.forwards - 2
    return model._fastattn.runtime.groups, call


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["no end", "ends"])
@pytest.mark.parametrize("loop", LOOPS)
def test_an_ordinary_call_makes_its_pages_once(loop: str, ends: dict[str, Any], live: Live) -> None:
    groups, call = assert_equal(**LOOPS[loop], **ends)
    group = groups.group(None)
    rows = padded_batch()["attention_mask"].sum(1).tolist()
    # The last token is chosen but not stored.
    assert pages_for([row + NEW - 1 for row in rows]) <= group.pool.capacity <= pages_for([row + NEW for row in rows])
    assert live.made == 2 * len(group.storage._pages) and live.most == live.bytes == groups.nbytes
    assert call.graphs_captured == 1


def test_512_steps_capture_once(live: Live) -> None:
    _, model = pair_with_graphs("llama", {"page_size": SIZE}, num_hidden_layers=2)
    run(model, 512, **single(9), eos_token_id=VOCAB - 1, min_new_tokens=512)
    call = assert_fast(model)
    assert (call.graphs_captured, call.forwards, live.made) == (1, 512, 4)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kwargs", [{"num_return_sequences": 4, "do_sample": True, "temperature": 2.0}, {"num_beams": 4}])
def test_shared_prompts_capture_once(loop: str, kwargs: dict[str, Any]) -> None:
    _, model = pair_with_graphs("llama", {"page_size": SIZE})
    run(model, **kwargs, **LOOPS[loop])
    call, pool = assert_fast(model, shared=True), model._fastattn.runtime.groups.group(None).pool
    rows = padded_batch()["attention_mask"].sum(1).tolist()
    prompts, tails = pages_for(rows), sum(4 * (pages_for([row + NEW]) - row // SIZE) for row in rows)
    assert pool.capacity <= (prompts + tails + 12) * 1.02
    assert call.graphs_captured == 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_rows_that_may_end_grow_in_small_steps(family: str, loop: str, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    for module in (reach, decode_loop):
        monkeypatch.setattr(module, "AHEAD", 8)
    batch = single(21)
    groups, call = assert_equal(family, 100, **batch, **LOOPS[loop], **ENDS)
    # A step each eight tokens or some fewer, since the host lags, but not as many as pages; and never far ahead.
    assert 2 < call.graphs_captured <= 15
    assert groups.group(None).pool.capacity <= pages_for([121])
    # One layer's keys and values twice at most.
    pair = max(sum(pages.nbytes for pages in held) for group in groups for held in group.storage._pages.values())
    assert live.bytes == groups.nbytes and live.most < live.bytes + pair


@pytest.mark.parametrize("loop", LOOPS)
def test_rows_that_end_soon_hold_little(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    for module in (reach, decode_loop):
        monkeypatch.setattr(module, "AHEAD", 8)
    stock, model = pair_with_graphs("llama", {"page_size": SIZE})
    first = run(stock, 12, **single(21))[0]
    ends = {"eos_token_id": [int(first[-1])], **single(21), **LOOPS[loop]}
    ours, want = run(model, 5000, **ends), run(stock, 5000, **ends)
    assert torch.equal(ours, want) and want.shape[1] < 60
    tokens = want.shape[1]
    assert model._fastattn.runtime.groups.group(None).pool.capacity <= pages_for([tokens + 8 + 4])


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "mistral_window"])
def test_a_longer_call_drops_what_a_shorter_one_left(family: str, live: Live) -> None:
    stock, model = pair_with_graphs(family, {"page_size": SIZE})
    for new in (8, 60):
        assert torch.equal(run(model, new), run(stock, new))
        assert_fast(model)
    assert live.most == live.bytes


@pytest.mark.parametrize("turns", [2])
def test_chat_turns_over_a_users_cache(turns: int) -> None:
    stock, model = pair_with_graphs("llama", {"page_size": SIZE})
    cache, ids = hf_fastattn.PagedCache(model.config, groups=model._fastattn.runtime.groups), single(21)["input_ids"]
    for _ in range(turns):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = run(stock, **given)
        assert torch.equal(run(model, **given, **{CACHE: cache}), want)
        assert assert_fast(model, held=None).graphs_captured == 1
        ids = torch.cat((want, want[:, :7]), 1)
    assert cache.groups.group(None).pool.capacity <= pages_for([want.shape[1]]) + 1


def test_a_call_of_rows_that_end_at_known_lengths() -> None:
    _, model = pair_with_graphs("llama", {"page_size": SIZE})
    model._fastattn.runtime.row_limits = [3, 17, 40]
    run(model)
    assert assert_fast(model, real_tokens(padded_batch())).graphs_captured >= 1


@pytest.mark.parametrize(
    ("given", "ahead"),
    [
        ((100, 150, 150, True), 50),
        ((100, 5000, 612, True), 512),
        ((300, 5000, 612, False), 312),
        ((600, 5000, 612, False), 64),
        ((4096, 5000, 612, False), 128),
        ((4990, 5000, 612, False), 10),
        # Nobody said how long the rows will be.
        ((100, 0, 0, True), 0),
        ((100, 0, 0, False), 64),
        ((100, 90, 90, False), 64),
    ],
)
def test_how_far_ahead(given: tuple[int, int, int, bool], ahead: int) -> None:
    assert tokens_ahead(*given) == ahead


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("ends", [{}, ENDS], ids=["no end", "ends"])
def test_where_memory_is_short_pages_are_made_as_they_are_needed(
    loop: str, ends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that ends early has the memory that stock needs, and no error."""
    stock, model = pair_with_graphs("llama", {"page_size": SIZE})
    grown = PageStorage._grown
    first = run(stock, 12, **single(21))[0]
    given = {**single(21), "eos_token_id": [int(first[-1])], **LOOPS[loop]} if ends else {**single(21), **LOOPS[loop]}
    new = 400 if ends else 12
    want = run(stock, new, **given)
    most = pages_for([want.shape[1] + (64 if loop == "device" and ends else 0)])

    def out_of_memory(old: Any, shape: Any, like: Any) -> torch.Tensor:
        if shape[0] > most:
            raise torch.OutOfMemoryError("simulated")
        return grown(old, shape, like)

    monkeypatch.setattr(PageStorage, "_grown", staticmethod(out_of_memory))
    assert torch.equal(run(model, new, **given), want)
    assert_fast(model)


WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}


def peak(model: Any, rows: int, columns: int, new: int, **kwargs: Any) -> tuple[int, torch.Tensor]:
    """Most bytes of tensors that exist at any time of the call, and its tokens."""
    ids = torch.randint(1, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))
    with PeakBytes() as counted:
        tokens = run(model, new, input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)
    return counted.most, tokens


@pytest.mark.parametrize(
    ("shape", "kwargs"), [((16, 64, 8), {}), ((1, 300, 6), ENDS), ((4, 64, 24), {"num_beams": 2})], ids=str
)
def test_no_larger_than_stock(shape: tuple[int, int, int], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_prefill, "CPU_TOKENS", 250)
    # So that the first steps of a call are as few as the others here.
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    # The tensors of recorded steps have a size of their own.
    stock, model = tiny("llama", **WIDE), hf_fastattn.patch(tiny("llama", **WIDE), cuda_graphs=False)
    (theirs, want), (ours, got) = peak(stock, *shape, **kwargs), peak(model, *shape, **kwargs)
    assert torch.equal(got, want)
    assert assert_fast(model).forwards > shape[2]
    assert ours <= theirs
