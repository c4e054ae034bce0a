"""Which forwards are rehearsed, with which layers, and that a rehearsal leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import hf_fastattn
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.patches.fused.rehearse import rehearse
from tests.tools.models import tiny

Walks = list[tuple[list[Any], tuple[int, ...], bool]]


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.DEVICES", ("cpu",))
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.can_rehearse", lambda: True)
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.rehearsal", contextlib.nullcontext)


@pytest.fixture
def decoder() -> Any:
    return hf_fastattn.patch(tiny("llama").eval()).model


@contextlib.contextmanager
def forward(decoder: Any, rows: int, columns: int, room: int = 0) -> Iterator[PagedCache]:
    cache = PagedCache(decoder.config)
    cache.room = room
    cache.begin(rows, columns)
    yield cache
    cache.rollback()


def walks(decoder: Any, cache: PagedCache, columns: int, fails: bool = False) -> Walks:
    """Layers, shape of the states and kind of the batch of every walk."""
    seen: Walks = []
    states = torch.zeros(len(cache.lengths), columns, decoder.config.hidden_size)

    def walk(layers: Iterable[Any], states: torch.Tensor, positions: dict[str, Any]) -> None:
        assert cache.paged_batch is not None and positions["position_embeddings"][0].shape[-2] == states.shape[1]
        seen.append((list(layers), tuple(states.shape[:2]), cache.paged_batch.is_decode))
        # What one layer leaves for those like it.
        cache.paged_batch._work_lists["tiles"] = None
        if fails:
            raise RuntimeError("no such kernel")

    positions = {"position_embeddings": decoder.rotary_emb(states, torch.arange(columns)[None])}
    held = cache.paged_batch
    rehearse(decoder, cache, states, positions, walk)
    assert cache.paged_batch is held and not held._work_lists
    return seen


def test_a_size_is_rehearsed_once(decoder: Any) -> None:
    for columns, rehearsed in ((9, True), (12, False), (17, True)):
        with forward(decoder, 2, columns) as cache:
            found = walks(decoder, cache, columns)
            assert found == ([([decoder.layers[0]], (2, columns), False)] if rehearsed else [])


def test_a_prompt_and_its_steps(decoder: Any) -> None:
    for room, steps in ((9, []), (10, []), (11, [([decoder.layers[0]], (4, 1), True)])):
        decoder._fastattn.runtime.rehearsed.clear()
        with forward(decoder, 3, 9, room) as cache:
            assert walks(decoder, cache, 9) == [([decoder.layers[0]], (3, 9), False), *steps], room


def test_one_layer_of_each_kind() -> None:
    types = ["full_attention"] * 2 + ["sliding_attention"] * 2
    options = {"layer_types": types, "num_hidden_layers": 4, "sliding_window": 4, "use_sliding_window": True}
    decoder = hf_fastattn.patch(tiny("qwen2", **options).eval()).model
    with forward(decoder, 1, 5) as cache:
        assert [found[0] for found in walks(decoder, cache, 5)] == [[decoder.layers[0], decoder.layers[2]]]


def test_nobody_elses_code_is_called_twice(decoder: Any) -> None:
    decoder.layers[0].mlp.register_forward_hook(lambda *given: None)
    with forward(decoder, 2, 9) as cache:
        assert walks(decoder, cache, 9) == []


def test_a_rehearsal_that_fails_is_no_failure(decoder: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hf_fastattn"), forward(decoder, 2, 9) as cache:
        assert len(walks(decoder, cache, 9, fails=True)) == 1
    assert "no such kernel" in caplog.text
