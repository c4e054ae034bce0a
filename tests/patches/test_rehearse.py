"""Which forwards are rehearsed, with which layers, and that a rehearsal leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import hf_fastattn
from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.call import Call
from hf_fastattn.kernels.attention import rope_reference
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.patches.fused.rehearse import rehearse
from tests.tools.models import tiny

Walks = list[tuple[list[Any], tuple[int, ...], bool]]


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.DEVICES", ("cpu",))
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.can_rehearse", lambda: True)
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.rehearsal", contextlib.nullcontext)
    monkeypatch.setattr("hf_fastattn.kernels.attention.rope_tables.rope_tables", rope_reference.tables)


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
            assert walks(decoder, cache, 9) == [*steps, ([decoder.layers[0]], (3, 9), False)], room


@pytest.mark.parametrize("whose", ["the length's", "the user's"])
def test_a_rotary_embedding_that_may_change_is_not_called(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic RoPE keeps the frequencies of the longest text so far until a text begins anew; a user's may count calls."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    over: dict[str, Any] = {"rope_parameters": rope, "max_position_embeddings": 16} if whose == "the length's" else {}
    decoder = hf_fastattn.patch(tiny("llama", **over).eval()).model
    states, calls = torch.zeros(3, 200, decoder.config.hidden_size), list[Any]()
    if over:
        decoder.rotary_emb(states, torch.arange(200)[None])
    else:
        own = type("Own", (type(decoder.rotary_emb),), {})
        decoder.rotary_emb.__class__ = own
    before = decoder.rotary_emb.inv_freq.clone()
    with forward(decoder, 3, 30, 90) as cache:
        plain = type(decoder.rotary_emb).forward
        table = decoder.rotary_emb(states[:, :30], torch.arange(30)[None])
        monkeypatch.setattr(
            type(decoder.rotary_emb), "forward", lambda *given, **named: (calls.append(given), plain(*given, **named))[1]
        )
        seen: list[tuple[int, ...]] = []

        def walk(layers: Any, states: torch.Tensor, positions: dict[str, Any]) -> None:
            seen.append(tuple(positions["position_embeddings"][1].shape))

        rehearse(decoder, cache, states[:, :30], {"position_embeddings": table}, walk)
    assert seen == [(4, 1, 16), (1, 30, 16)] and not calls
    assert torch.equal(before, decoder.rotary_emb.inv_freq)


def within(decoder: Any, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(decoder._fastattn.runtime), "current", call)


def test_steps_are_those_of_the_rows_that_go_on(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples: as many rows as there will be, and their prefixes in groups as the loop will find them."""
    seen: list[Any] = []
    begun = Batch.static

    def static(*given: Any, **named: Any) -> Batch:
        seen.append(given[3])
        return begun(*given, **named)

    attended: list[tuple[int, int]] = []

    def attend(self: Batch, q: torch.Tensor, *given: Any, **named: Any) -> None:
        attended.append((len(q), 0 if self.shared is None else self.shared.max_group_rows))

    monkeypatch.setattr(Batch, "static", static)
    monkeypatch.setattr(Batch, "attend", attend)
    # The layers before the step have made them.
    monkeypatch.setattr(PageStorage, "any_pages", lambda self: torch.zeros(1, size, 1, 16))
    size = decoder._fastattn.runtime.config.page_size
    samples = [0] * 5 + [1] * 4
    for copies, pays, groups in ((samples, True, 8), (samples, False, 0), ([0, 1], True, 0), (None, True, 0)):
        monkeypatch.setattr("hf_fastattn.cache.prefix_groups.WORTH_BYTES", 1 if pays else 2**60)
        seen.clear()
        attended.clear()
        decoder._fastattn.runtime.rehearsed.clear()
        within(decoder, Call(copies=copies), monkeypatch)
        with forward(decoder, 2, size + 3, size + 9) as cache:
            found = walks(decoder, cache, size + 3)
        rows = 16 if copies is samples else 2
        assert [walk[1] for walk in found] == [(rows, 1), (2, size + 3)], (copies, pays)
        found_groups = {0 if shared is None else shared.max_group_rows for shared in seen}
        assert found_groups == {groups}, (copies, pays)
        # Before the layers, as it takes longest to compile.
        assert attended == [(2 * (size + 3), 0), *([(rows, groups)] if groups else [])], (copies, pays)


def test_the_choice_is_rehearsed_with_the_prompt(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed: list[str] = []
    within(decoder, Call(rehearses_too=lambda: rehearsed.append("choice")), monkeypatch)
    for _ in range(2):
        with forward(decoder, 2, 9) as cache:
            walks(decoder, cache, 9)
    assert rehearsed == ["choice"]


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


def test_attention_and_the_choice_are_begun_first(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def attend(
        batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Any, *, scale: float, variant: Any
    ) -> None:
        seen.append((q.shape, q.dtype, k.shape[1:], window, scale, batch.tokens))

    monkeypatch.setattr(Batch, "attend", attend)
    within(decoder, Call(rehearses_too=lambda: seen.append("choice")), monkeypatch)
    real = decoder.layers[0].self_attn
    with forward(decoder, 2, 9) as cache, monkeypatch.context() as patched:
        rehearsed = "hf_fastattn.kernels.rehearsal.compile_ahead"
        patched.setattr(rehearsed, lambda device, run: (run(), seen.append("end")))
        walks(decoder, cache, 9)
        heads = (decoder.config.num_attention_heads, decoder.config.num_key_value_heads)
        size = (decoder._fastattn.runtime.config.page_size, heads[1], real.head_dim)
        assert seen == [((18, heads[0], real.head_dim), torch.float32, size, None, real.scaling, 18), "choice", "end"]


def test_keys_whose_dtype_is_not_known_are_not_made(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Batch, "attend", lambda *given, **options: seen.append("attention"))
    decoder.layers[0].self_attn.q_proj.to(torch.bfloat16)
    with forward(decoder, 2, 9) as cache:
        assert len(walks(decoder, cache, 9)) == 1
    assert seen == []
