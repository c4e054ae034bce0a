"""A model that Transformers spread over two processes, patched: the device's loop on each rank, one process's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.parallel import ranks
from tests.parallel.calls import SAMPLED, assert_looped, calls_of, one_process
from tests.tools.models import VOCAB, padded_batch, single
from tests.tools.processes import Processes, processes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as started:
        yield started


@pytest.mark.parametrize("fused", [False, True], ids=["called", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_have_one_process_s_tokens(two: Processes, saved: Any, family: str, fused: bool) -> None:
    calls = calls_of(family)
    want = one_process(family, calls)
    for found in two.run(ranks.generate, saved(family), calls, fused):
        for (tokens, call), expected in zip(found, want, strict=True):
            assert torch.equal(tokens, expected)
            assert_looped(call)


def test_products_are_of_this_rank_s_weights(two: Processes, saved: Any) -> None:
    calls = [{**single(), "max_new_tokens": 6, "do_sample": False}]
    layers, forwards = 3, 6 + 1
    for sums, gathers, seen, held in two.run(ranks.traced, saved("llama"), calls[0]):
        # Two sums a layer, and the embedding's where the plan cuts that; a step is run once before it is captured.
        assert sums in (2 * layers * forwards, (2 * layers + 1) * forwards)
        # The prompt's head is called.
        assert gathers == forwards - 1
        assert seen <= held


@pytest.mark.parametrize("pushes", [False, True], ids=["read", "pushed"])
def test_sums_in_peer_memory(two: Processes, saved: Any, pushes: bool) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process("llama", [call])[0]
    for tokens, counted, sums, ways in two.run(ranks.generate_by_peers, saved("llama"), call, pushes):
        assert ways == {"pushed" if pushes else "read"}
        assert torch.equal(tokens, want)
        assert_looped(counted)
        # Two of each of three layers, in eleven steps, one of them twice; the prompt of 69 tokens is too long.
        assert sums == 2 * 3 * 12


@pytest.mark.parametrize("slots", [False, True], ids=["group", "copies"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_prompts_in_halves(two: Processes, saved: Any, family: str, slots: bool) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process(family, [call])[0]
    for tokens, counted, shapes in two.run(ranks.generate_in_halves, saved(family), call, slots):
        assert torch.equal(tokens, want)
        assert_looped(counted)
        # Two of each of three layers, of each half of 69 tokens, which are padded to 128.
        assert shapes == [(72, 64), (56, 64)] * 2 * 3


def test_a_rank_that_cannot_keeps_the_others_from_halves(two: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process("llama", [call])[0]
    for tokens, counted, shapes in two.run(ranks.generate_in_halves, saved("llama"), call, False, 1):
        assert torch.equal(tokens, want) and shapes == []
        assert_looped(counted)


def test_tied_embeddings(two: Processes, saved: Any) -> None:
    calls = [{**padded_batch(), "max_new_tokens": 12, "do_sample": False}]
    want = one_process("llama", calls, tie_word_embeddings=True)
    for found in two.run(ranks.generate, saved("llama", tie_word_embeddings=True), calls, True):
        tokens, call = found[0]
        assert torch.equal(tokens, want[0])
        assert call.fast_loops == 1 or "tensor parallel" in str(call.fallbacks)


def test_ranks_draw_by_rank_0_s_seed(two: Processes, saved: Any) -> None:
    call = {**padded_batch(), **SAMPLED}
    want = one_process("llama", [call])[0]
    (first, call_0), (second, call_1) = two.run(ranks.generate_with_own_seed, saved("llama"), dict(call))
    assert torch.equal(first, want) and torch.equal(second, want)
    assert call_0.fast_loops == call_1.fast_loops == 1


def test_whole_experts_on_each_rank_run_transformers_own_path(two: Processes, saved: Any) -> None:
    calls = [{**padded_batch(), "max_new_tokens": 8, "do_sample": False}]
    for (found,), stock in two.run(ranks.generate_and_stock, saved("qwen3_moe"), calls[0], True):
        assert torch.equal(found[0], stock)
        reasons = list(found[1].fallbacks)
        assert len(reasons) == 1 and "tensor parallel" in reasons[0] and "Experts" in reasons[0]
        assert found[1].fast_loops == 0


def test_a_head_that_is_cut_is_refused(two: Processes, saved: Any) -> None:
    over = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    for reason in two.run(ranks.why_not, saved("llama", **over)):
        assert reason == "tensor parallel: 3 key heads over 2 ranks"


def test_what_is_changed_after_it_was_looked_at(two: Processes, saved: Any) -> None:
    for loaded, wrapped, unwrapped, replaced, restored in two.run(ranks.reasons_after_changes, saved("llama")):
        assert loaded is None and unwrapped is None and restored is None
        assert "is not understood" in wrapped and "is not understood" in replaced


def test_other_prompts_on_another_rank_are_an_error(two: Processes, saved: Any) -> None:
    for text in two.run(ranks.error_of_other_prompts, saved("llama"), single()["input_ids"], VOCAB):
        assert text.startswith("ValueError: generate() was called with another prompt") and "same call" in text


def test_other_options_on_another_rank_are_an_error(two: Processes, saved: Any) -> None:
    call = {**single(), "max_new_tokens": 4, "do_sample": False}
    for text in two.run(ranks.error_of_other_options, saved("llama"), call):
        assert text.startswith("ValueError: the model was patched with other options on rank")


def test_a_rank_that_cannot_loop_keeps_the_others_from_it(two: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process("llama", [call])[0]
    (first, call_0), (second, call_1) = two.run(ranks.generate_with_a_processor_on_rank_1, saved("llama"), call)
    assert torch.equal(first, want) and torch.equal(second, want)
    assert call_0.fast_loops == call_1.fast_loops == 0
    assert "another rank" in next(iter(call_0.not_looped)) and "Same" in next(iter(call_1.not_looped))


def test_a_capture_that_fails_on_one_rank_fails_on_all(two: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process("llama", [call])[0]
    for tokens, counted in two.run(ranks.generate_with_a_failing_capture, saved("llama"), call):
        assert torch.equal(tokens, want)
        assert counted.fast_loops == 1 and counted.graphs_captured == 0
        assert "capturing it failed" in next(iter(counted.uncaptured))


def test_graphs_dropped_on_one_rank_are_dropped_on_all(two: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process("llama", [call])[0]
    for tokens, counted in two.run(ranks.generate_after_rank_1_released, saved("llama"), call):
        assert torch.equal(tokens, want)
        assert counted.graphs_captured == 1


def test_unpatched_is_as_before(two: Processes, saved: Any) -> None:
    assert two.run(ranks.patched_and_unpatched, saved("llama")) == [True, True]
    assert hf_fastattn.__version__
