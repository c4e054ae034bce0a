"""What one rank alone has, or is given: all compute the same call all the same, or each ends with an error that says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parallel import alone
from tests.parallel.calls import ENDS, SAMPLED, assert_looped, one_process, stock_tokens
from tests.tools.models import padded_batch, single
from tests.tools.processes import Processes, processes

GREEDY: dict[str, Any] = {**padded_batch(), "max_new_tokens": 10, "do_sample": False}
# Rows of a prompt that begin alike, and end early.
ROWS: dict[str, Any] = {
    "input_ids": single()["input_ids"].repeat(3, 1), "max_new_tokens": 16, "do_sample": False, "eos_token_id": ENDS,
    "pad_token_id": 0,
}  # fmt: skip
BEAMS: dict[str, Any] = {**padded_batch(2), "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
CALLS = {"padded": GREEDY, "rows": ROWS, "beams": BEAMS}
# Of what a rank has alone, the reason there, and on the others.
ELSEWHERE = "another rank differs from this one"
APART = {
    "hook": ("on this rank alone, a LlamaMLP has hooks", ELSEWHERE),
    "hook on the head": ("on this rank alone, a Linear has hooks", ELSEWHERE),
    "wrapped forward": ("on this rank alone, the forward of a LlamaRMSNorm was replaced", ELSEWHERE),
    "train mode": ("ranks differ in train mode", "ranks differ in train mode"),
}
# The same where all go on over pages, in Transformers' loop.
NOT_LOOPED = {
    "processor": "a Same looks at the logits",
    "criterion": "stopping criteria Never",
    "scores": "output_scores is asked for",
    "streamer": "a streamer that is not Transformers' may change the model when some rows have ended",
}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as started:
        yield started


def found(two: Processes, saved: Any, what: str, name: str, where: int) -> list[list[tuple[Any, Any]]]:
    """Counters of two calls in which a rank has something alone, and of one after them; tokens are stock's."""
    want = stock_tokens("llama", CALLS[name])
    both: list[list[tuple[Any, Any]]] = two.run(alone.generated, saved("llama"), what, CALLS[name], where, 2)
    for calls in both:
        for tokens, _ in calls:
            assert torch.equal(tokens, want)
        assert_looped(calls[-1][1])
    return [both[where], both[1 - where]]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", APART)
def test_transformers_path_on_every_rank(two: Processes, saved: Any, what: str, name: str, where: int) -> None:
    for calls, reason in zip(found(two, saved, what, name, where), APART[what], strict=True):
        for _, call in calls[:-1]:
            assert [*call.fallbacks] == [f"tensor parallel: {reason}{': its report has the reason' * (reason == ELSEWHERE)}"]
            assert not call.fast_loops and not call.forwards


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("what", NOT_LOOPED)
def test_transformers_loop_on_every_rank(two: Processes, saved: Any, what: str, where: int) -> None:
    mine, other = found(two, saved, what, "rows", where)
    for _, call in (*mine[:-1], *other[:-1]):
        assert not call.fast_loops and call.forwards and not call.fallbacks
    assert NOT_LOOPED[what] in next(iter(mine[0][1].not_looped))
    assert "another rank runs Transformers' own loop" in next(iter(other[0][1].not_looped))


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("what", ["dict", "dynamic cache", "own paged", "eager"])
def test_what_makes_no_difference(two: Processes, saved: Any, what: str, where: int) -> None:
    for calls in found(two, saved, what, "rows", where):
        for _, call in calls:
            assert_looped(call)


@pytest.mark.parametrize("hooked", [False, True], ids=["looped", "hooked"])
@pytest.mark.parametrize("what", ["prompt", "shorter", "longer prompt", "cache", "end", "strategy", "synced"])
def test_another_call_is_an_error_on_every_rank(two: Processes, saved: Any, what: str, hooked: bool) -> None:
    call = {**single(), "max_new_tokens": 6, "do_sample": False, **({"hooked": True} if hooked else {})}
    for error, after, counted in two.run(alone.error_and_next, saved("llama"), call, what):
        assert error.startswith("ValueError: generate() was called with another prompt or other options on rank")
        assert not after
        assert_looped(counted)


def test_other_tokens_are_an_error_on_every_rank(two: Processes, saved: Any) -> None:
    call = {**single(), "max_new_tokens": 6, "do_sample": False}
    for error, after, counted in two.run(alone.error_and_next, saved("llama"), call, "tokens"):
        assert error.startswith("ValueError: rank") and "has generated other tokens than this one" in error
        assert not after
        assert_looped(counted)


def test_transformers_loop_draws_as_rank_0(two: Processes, saved: Any) -> None:
    call = {**single(), **SAMPLED}
    want = stock_tokens("llama", call)
    (first, call_0, next_0), (second, call_1, next_1) = two.run(alone.drawn_in_transformers_loop, saved("llama"), dict(call))
    assert torch.equal(first, want) and torch.equal(second, want)
    assert not call_0.fast_loops and not call_1.fast_loops
    # Each rank's own numbers go on.
    torch.manual_seed(call["seed"] + 1)
    assert next_0 != next_1 and next_1 == float([torch.rand(1) for _ in range(2)][1])


@pytest.mark.parametrize("what", ["streamer", "released", "replaced"])
def test_pages_of_earlier_calls_are_the_same_on_every_rank(two: Processes, saved: Any, what: str) -> None:
    ids = torch.arange(1, 41)[None]
    prompts = [torch.cat((ids, ids[:, : 8 * more]), 1) for more in range(4)]
    calls = [{"input_ids": prompt, "max_new_tokens": 6, "do_sample": False} for prompt in prompts]
    want = one_process("llama", calls)
    reused = []
    for both in two.run(alone.generated_with_prefixes, saved("llama"), calls, what, 2):
        for (tokens, call), expected in zip(both, want, strict=True):
            assert torch.equal(tokens, expected)
            assert_looped(call)
        reused.append([call.tokens_reused for _, call in both])
    assert reused[0] == reused[1] and reused[0] == [0, 40, 48 if what == "streamer" else 0, 56]


def test_a_weight_in_another_place(two: Processes, saved: Any) -> None:
    """Steps are recorded anew on every rank, where one has to."""
    want = stock_tokens("llama", GREEDY)
    for calls in two.run(alone.generated_with_replaced_weight, saved("llama"), GREEDY):
        assert all(torch.equal(tokens, want) for tokens, _ in calls)
        assert [call.graphs_captured for _, call in calls] == [1, 1, 0]
        for _, call in calls:
            assert_looped(call)


@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
def test_no_memory_for_more_pages(two: Processes, saved: Any, on: tuple[int, ...]) -> None:
    """On one rank alone it ends the call on both; on both they go on with fewer pages."""
    call = {**GREEDY, "max_new_tokens": 60, "eos_token_id": 5, "pad_token_id": 0}
    results = two.run(alone.without_memory_for_pages, saved("llama"), call, on)
    for rank, (error, after, counted) in enumerate(results):
        where = "on this rank" if rank in on else "on another rank"
        assert (error == "") if len(on) == 2 else (error.startswith("OutOfMemoryError") and where in error)
        assert not after
        assert_looped(counted)


def test_unpatched_on_one_rank(two: Processes, saved: Any) -> None:
    error, _ = two.run(alone.errors_of_unpatched, saved("llama"), GREEDY)
    assert error.startswith("ValueError: rank 1 has unpatched the model")
