"""Models over two GPUs: tokens of Transformers' own ranks, prompts in halves, and the end of calls in which a rank fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import failing, on_gpus
from tests.parallel.calls import ENDS, assert_looped
from tests.tools.models import padded_batch, single, tiny
from tests.tools.processes import Processes, processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GREEDY: dict[str, Any] = {**padded_batch(), "max_new_tokens": 24, "do_sample": False}
CALLS: list[dict[str, Any]] = [
    GREEDY,
    {**padded_batch(9, 37), "max_new_tokens": 40, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0},
    {"input_ids": single()["input_ids"].repeat(20, 1), "max_new_tokens": 12, "do_sample": False},
]


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2, backend="nccl") as started:
        yield started


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_tokens_of_transformers_own_ranks(two: Processes, saved: Any, family: str) -> None:
    for found in two.run(on_gpus.tokens_of, saved(family), CALLS):
        for want, ours, call in found:
            assert all(torch.equal(tokens, want) for tokens in ours)
            assert_looped(call)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_prompts_in_halves(two: Processes, saved: Any, family: str) -> None:
    for whole, found, count, why_no_peers in two.run(on_gpus.in_halves, saved(family), GREEDY):
        if why_no_peers is not None:
            pytest.skip(f"the GPUs do not read each other's memory: {why_no_peers}")
        assert all(torch.equal(tokens, whole) for tokens in found)
        # Two of each of three layers, of each half, in three calls.
        assert count == 3 * 2 * 3 * 2


def test_a_hook_on_one_rank_alone(two: Processes, saved: Any) -> None:
    for want, hooked, after, apart, looped in two.run(on_gpus.with_a_hook_on_rank_1, saved("llama"), GREEDY):
        assert torch.equal(hooked, want) and torch.equal(after, want)
        assert not apart.fast_loops and "tensor parallel" in str(apart.fallbacks)
        assert_looped(looped)


@pytest.mark.parametrize("how", ["raises", "has no memory", "is killed"])
def test_the_other_rank_ends(tmp_path: Path, how: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    errors = tmp_path / "errors"
    with processes(2, str(errors), backend="nccl") as pair:
        pair.send(failing.generate_and_fail, str(tmp_path), "step", how)
        other = pair.receive(0, 60)
        failed = None if how == "is killed" else pair.receive(1, 60)
    # Its communicator was aborted, or its process ended: a kernel that waits for another GPU is not.
    assert other is None or other.startswith("RankFailedError"), other
    assert other is not None or "hf_fastattn ends this process, rank 0: rank 1" in errors.read_text()
    assert how == "is killed" or "; then RankFailedError" in failed
