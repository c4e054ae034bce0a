"""Weights that are gathered forward by forward (FSDP 2, ZeRO-3): one process's tokens, as many forwards on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parallel import sharded
from tests.parallel.calls import ENDS
from tests.tools.processes import Processes, processes

UNCAPTURED = "forwards gather the weights from other processes: a FSDPLlamaDecoderLayer is sharded by FSDP"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
# Rows, and so processes, end after different numbers of steps.
ENDING: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as started:
        yield started


def check(found: list[Any], how: str) -> None:
    for tokens, want, call, report in found:
        assert torch.equal(tokens, want)
        assert call.forwards > 0 and not call.fast_loops
        # DeepSpeed's hooks are not PyTorch's own: they may look at hidden states.
        assert not call.fallbacks or (how == "zero3" and "equal rows are computed one by one" in str(call.fallbacks))
        if how in ("layers and root", "layers"):
            assert list(call.uncaptured) == [UNCAPTURED] and "deepspeed.zero.GatheredParameters" in report


@pytest.mark.parametrize("patch_first", [False, True], ids=["patched after", "patched before"])
@pytest.mark.parametrize("how", ["layers and root", "layers", "root", "inside", "zero3"])
def test_one_process_s_tokens(two: Processes, how: str, patch_first: bool) -> None:
    check(two.run(sharded.generated, how, "different", GREEDY, patch_first), how)


@pytest.mark.parametrize("patch_first", [False, True], ids=["patched after", "patched before"])
def test_what_sharded_attention_looks_up_is_looked_at(two: Processes, patch_first: bool) -> None:
    """FSDP's classes are of a module of its own, in which nobody exchanges RoPE."""
    for tokens, want, call in two.run(sharded.with_another_rope, patch_first):
        assert torch.equal(tokens, want)
        assert list(call.fallbacks) == ["transformers.models.llama.modeling_llama.apply_rotary_pos_emb was replaced"]


@pytest.mark.parametrize("kind", ["begin alike", "equal", "long"])
@pytest.mark.parametrize("how", ["layers and root", "zero3"])
def test_no_rank_runs_forwards_that_the_others_do_not(two: Processes, how: str, kind: str) -> None:
    check(two.run(sharded.generated, how, kind, GREEDY, False), how)


@pytest.mark.parametrize("how", ["layers and root", "zero3"])
def test_ranks_that_end_at_different_steps(two: Processes, how: str) -> None:
    check(two.run(sharded.generated, how, "different", ENDING, False), how)


@pytest.mark.parametrize("how", ["layers and root", "root", "zero3"])
def test_weights_that_change_between_calls(two: Processes, how: str) -> None:
    check(two.run(sharded.generated, how, "different", GREEDY, False, 0.7), how)


def test_streams_are_refused(two: Processes) -> None:
    for text in two.run(sharded.error_of_streaming, "layers and root"):
        assert "sharded by FSDP" in text
