"""Models over four processes: tokens of one process, for layers and experts in four parts, and heads that cannot be cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parallel import ranks
from tests.parallel.calls import SAMPLED, assert_looped, calls_of, one_process
from tests.tools.models import padded_batch, pair_with_graphs
from tests.tools.processes import Processes, processes

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"layer_types": ["full_attention"] * 3}),
}
# Heads of queries, and of keys: one a rank.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
# Two ranks have halves of one key head.
SHARED = {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    with processes(4) as started:
        yield started


@pytest.mark.parametrize(("name", "fused"), [*((name, True) for name in FAMILIES), ("qwen3_moe", False)])
def test_ranks_have_one_process_s_tokens(four: Processes, saved: Any, name: str, fused: bool) -> None:
    family, over = FAMILIES[name]
    calls = calls_of(family)
    want = one_process(family, calls, **HEADS, **over)
    for found in four.run(ranks.generate, saved(family, **HEADS, **over), calls, fused):
        for (tokens, call), expected in zip(found, want, strict=True):
            assert torch.equal(tokens, expected)
            assert_looped(call)


def test_prompts_are_recorded(four: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 4, "do_sample": False}
    want = one_process("qwen3_moe", [call], **HEADS)[0]
    for found in four.run(ranks.generate, saved("qwen3_moe", **HEADS), [dict(call) for _ in range(3)], True):
        assert all(torch.equal(tokens, want) for tokens, _ in found)
        assert [(counted.appends_captured, counted.appends_replayed) for _, counted in found] == [(0, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_sums_in_peer_memory(four: Processes, saved: Any, name: str) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    want = one_process(name, [call], **HEADS)[0]
    for tokens, counted, sums, _ in four.run(ranks.generate_by_peers, saved(name, **HEADS), call):
        assert torch.equal(tokens, want)
        assert_looped(counted)
        # Two of each of three layers, in eleven steps, one of them twice; the prompt of 69 tokens is too long.
        assert sums == 2 * 3 * 12


def test_ranks_draw_by_rank_0_s_seed(four: Processes, saved: Any) -> None:
    call = {**padded_batch(), **SAMPLED}
    want = one_process("qwen3_moe", [call], **HEADS)[0]
    for tokens, counted in four.run(ranks.generate_with_own_seed, saved("qwen3_moe", **HEADS), dict(call)):
        assert torch.equal(tokens, want)
        assert counted.fast_loops == 1


@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("llama", False), ("qwen3", True), ("qwen3_moe", True)])
def test_fewer_key_heads_than_ranks(four: Processes, saved: Any, family: str, fused: bool) -> None:
    """Transformers cuts the heads then, and fails when it looks for them; patched, each rank has the whole one it reads."""
    calls = calls_of(family)
    want = one_process(family, calls, **SHARED)
    for found in four.run(ranks.generate, saved(family, **SHARED), calls, fused):
        for (tokens, call), expected in zip(found, want, strict=True):
            assert torch.equal(tokens, expected)
            assert_looped(call)


def test_one_key_head(four: Processes, saved: Any) -> None:
    over = {**SHARED, "num_key_value_heads": 1, "attention_bias": True}
    calls = calls_of("llama")[:2]
    want = one_process("llama", calls, **over)
    for found in four.run(ranks.generate, saved("llama", **over), calls, True):
        assert all(torch.equal(tokens, expected) for (tokens, _), expected in zip(found, want, strict=True))
        assert_looped(found[0][1])


def test_heads_that_are_shared_follow_their_weights(four: Processes, saved: Any) -> None:
    call = {**padded_batch(), "max_new_tokens": 12, "do_sample": False}
    for before, after, again, captured, held in four.run(ranks.generate_with_other_keys, saved("llama", **SHARED), call):
        assert not torch.equal(before, after) and torch.equal(before, again)
        # The recorded step reads the keys' weights where they were.
        assert captured == [1, 0, 0]
        assert held == [6, 0]


def test_heads_that_are_shared_in_forwards_of_ones_own(four: Processes, saved: Any) -> None:
    ids = padded_batch()["input_ids"]
    stock, _ = pair_with_graphs("llama", **SHARED)
    with torch.no_grad():
        want = stock(ids).logits
    for logits, forwards in four.run(ranks.forward_over_pages, saved("llama", **SHARED), ids):
        assert torch.allclose(logits, want, atol=1e-4) and forwards == 1


def test_forwards_without_pages_fail_as_stock_does(four: Processes, saved: Any) -> None:
    for texts in four.run(ranks.errors_without_pages, saved("llama", **SHARED), padded_batch()["input_ids"]):
        assert texts[0].startswith("RuntimeError: shape") and texts[1] == texts[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_key_heads_that_ranks_cannot_share(four: Processes, saved: Any, family: str) -> None:
    """Transformers cuts the heads then, and fails when it looks for them: a patched model fails as it does."""
    call = {**padded_batch(), "max_new_tokens": 4, "do_sample": False}
    over = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}
    for ours, stock, reason, held in four.run(ranks.errors_of_cut_heads, saved(family, **over), call):
        assert stock.startswith("RuntimeError: shape") and ours == stock
        assert reason == "tensor parallel: 3 key heads over 4 ranks" and not held
