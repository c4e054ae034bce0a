"""Models over four processes: tokens of one process, for layers and experts in four parts, and heads that cannot be cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parallel import ranks
from tests.parallel.calls import SAMPLED, assert_looped, calls_of, one_process
from tests.tools.models import padded_batch
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
    for tokens, counted, sums in four.run(ranks.generate_by_peers, saved(name, **HEADS), call):
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_fewer_key_heads_than_ranks(four: Processes, saved: Any, family: str) -> None:
    """Transformers cuts the heads then, and fails when it looks for them: a patched model fails as it does."""
    call = {**padded_batch(), "max_new_tokens": 4, "do_sample": False}
    for ours, stock, reason, held in four.run(ranks.errors_of_cut_heads, saved(family, num_attention_heads=8), call):
        assert stock.startswith("RuntimeError: shape") and ours == stock
        assert reason == "tensor parallel: 2 key heads over 4 ranks" and not held
