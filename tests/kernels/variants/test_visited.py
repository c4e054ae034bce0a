"""The lists of tiles that masks show: against the masks themselves, and attention that visits no others."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from hf_fastattn.kernels.attention.decode import paged_decode, tile_of_decode
from hf_fastattn.kernels.attention.paged import paged_attention, visited_tiles
from hf_fastattn.kernels.attention.prefill import paged_prefill, tile_of_prefill
from hf_fastattn.kernels.attention.visited import MASK_HIDES_NOTHING, Visited, list_rows, list_tiles
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, in_eight_bits, make_batch
from tests.kernels.variants.mods import MODS
from tests.kernels.variants.test_kernels import FP32, double, tables_on_the_gpu  # noqa: F401

# New tokens and earlier ones of each row.
BATCHES = {
    "decode": ([1, 1], [0, 130]),
    "append": ([5, 1], [60, 131]),
    "prefill": ([20, 9], [80, 0]),
}
# By document, by row and without causality, by head, with holes.
NAMES = ("document", "prefix-LM", "block-sparse", "sinks and window")
VARIANTS = {name: Variant(mask_mod=MODS[name].mask, causal=MODS[name].causal) for name in NAMES}
VARIANTS["dilated window"] = built_in.dilated(3, 9)
VARIANTS["one key of a window"] = Variant(window=40, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx != 70)
VARIANTS["nothing"] = Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 0)


def make(kind: str, ratio: int, device: str = "cpu") -> Batch:
    return make_batch(*BATCHES[kind], page=16, groups=28 // ratio // 2, ratio=ratio, dim=16, scattered=True, device=device)


def number_of(entries: torch.Tensor) -> torch.Tensor:
    """Entries of lists without their marks."""
    return entries & (MASK_HIDES_NOTHING.value - 1)


def lists_of(batch: Batch, kind: str, variant: Variant) -> Visited:
    compiled, heads = compile_variant(variant, 16, batch.q.device), (batch.q.shape[1], batch.k_pages.shape[2])
    options = {"heads": heads, "most_keys": batch.page_table.shape[1] * 16}
    if kind == "prefill":
        tile = tile_of_prefill(batch.q, batch.k_pages, False)
        options |= {"tokens": batch.q.shape[0], "block_m": tile.block_m, "block_n": tile.block_n}
        return list_tiles(compiled, batch.cu_seqlens_q, batch.seq_lens, **options)
    most = max(batch.counts)
    tile = tile_of_decode(batch.q, batch.k_pages, batch.page_table, most, 1, False, compiled)
    begins = None if kind == "decode" else batch.cu_seqlens_q
    return list_rows(compiled, begins, batch.seq_lens, max_query_len=most, block_n=tile.block_n, **options)


def seen_by(variant: Variant, batch: Batch, row: int) -> torch.Tensor:
    """`[H, S, L]`: what the queries of a row see."""
    count, length = batch.counts[row], batch.lengths[row]
    h, key = torch.arange(batch.q.shape[1]).int(), torch.arange(length).int()
    query = torch.arange(length - count, length).int()
    mask = variant.mask_mod
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        mask = torch.vmap(mask, dims)
    with TransformGetItemToIndex():
        shown = mask(torch.tensor(row).int(), h, query, key)
    shown = shown & (key <= query[:, None]) if variant.causal else shown
    return shown if variant.window is None else shown & (key > query[:, None] - variant.window)


def items_of(batch: Batch, visited: Visited) -> list[tuple[int, int, int]]:
    """Row, first and last packed query of each item."""
    ratio, found = batch.q.shape[1] // batch.k_pages.shape[2], []
    for row, count in enumerate(batch.counts):
        size = visited.block_m or count * ratio
        found += [(row, first, min(first + size, count * ratio)) for first in reversed(range(0, count * ratio, size))]
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_lists_are_those_of_the_mask(name, kind):
    ratio = (1, 4, 7)[sum(map(len, (name, kind))) % 3]
    variant, batch = VARIANTS[name], make(kind, ratio)
    visited = lists_of(batch, kind, variant)
    by_head = visited.counts.shape[1] > 1
    for item, (row, first, last) in enumerate(items_of(batch, visited)):
        seen = seen_by(variant, batch, row)
        packed = torch.arange(first, last)
        for place in range(visited.counts.shape[1]):
            heads = place * ratio + packed % ratio if by_head else torch.zeros_like(packed)
            shown = seen[heads, packed // ratio]
            columns = -(-shown.shape[1] // visited.block_n)
            some, whole = torch.zeros(2, columns, dtype=torch.bool)
            for tile in range(columns):
                keys = shown[:, tile * visited.block_n : (tile + 1) * visited.block_n]
                some[tile], whole[tile] = keys.any(), keys.all() and keys.shape[1] == visited.block_n
            whole &= visited.block_m > 0
            counts, tiles = visited.counts[item, place].tolist(), number_of(visited.tiles[item, place]).tolist()
            assert tiles[: counts[0]] == whole.nonzero()[:, 0].tolist()
            assert sorted(tiles[len(tiles) - counts[1] :]) == (some & ~whole).nonzero()[:, 0].tolist()


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_marks_say_where_the_mask_hides_nothing(name, kind):
    variant, batch = VARIANTS[name], make(kind, 4)
    shown_by_all = dataclasses.replace(variant, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= 0)
    visited = lists_of(batch, kind, variant)
    size, marks = visited.block_n, 0
    for item, (row, first, last) in enumerate(items_of(batch, visited)):
        seen, most = (seen_by(x, batch, row)[:, first // 4 : (last - 1) // 4 + 1] for x in (variant, shown_by_all))
        for place, (whole, partly) in enumerate(visited.counts[item].tolist()):
            heads = slice(place * 4, place * 4 + 4) if visited.counts.shape[1] > 1 else slice(0, 1)
            columns = visited.tiles.shape[2]
            for column in (*range(whole), *range(columns - partly, columns)):
                entry = visited.tiles[item, place, column]
                tile = number_of(entry).item()
                keys = slice(tile * size, (tile + 1) * size)
                hides = bool((most[heads, :, keys] & ~seen[heads, :, keys]).any())
                assert entry.item() == tile + (0 if hides else MASK_HIDES_NOTHING.value)
                marks += not hides
    assert bool(marks) == (name != "nothing" and (name, kind) != ("dilated window", "prefill"))


def attend(batch: Batch, kind: str, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    compiled, visited = compile_variant(variant, 16, batch.q.device), lists_of(batch, kind, variant)
    pages = (batch.q, batch.k_pages, batch.v_pages, batch.page_table)
    options = {"scale": batch.scale, "variant": compiled, "visited": visited}
    if kind == "prefill":
        return paged_prefill(*pages, batch.cu_seqlens_q, batch.seq_lens, **options)
    room = Workspace(batch.q.device)
    # So that items are cut and merged.
    room.processors = 1
    if kind == "append":
        options |= {"cu_seqlens_q": batch.cu_seqlens_q, "max_query_len": max(batch.counts)}
    return paged_decode(*pages, batch.seq_lens, workspace=room, **options)


def check(name: str, kind: str, ratio: int, device: str = "cpu") -> None:
    variant, batch = VARIANTS[name], make(kind, ratio, device)
    out, lse = attend(batch, kind, variant)
    want, want_lse = double(variant, batch)
    torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-4, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_of_listed_tiles(name, kind):
    check(name, kind, (1, 4, 7)[sum(map(len, (name, kind))) % 3])


@pytest.mark.gpu
@pytest.mark.usefixtures("tables_on_the_gpu")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_attention_of_listed_tiles(name, kind):
    check(name, kind, 7, "cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
def test_hidden_tiles_are_not_read(kind):
    """Their pages hold NaN, which a value that is read would carry into the output."""
    variant, batch = built_in.sinks_and_window(4, 16), make(kind, 4)
    want, _ = double(variant, batch)
    size = lists_of(batch, kind, variant).block_n
    for row, (length, count) in enumerate(zip(batch.lengths, batch.counts, strict=True)):
        first = -(-16 // size) * size
        last = (length - count - 16) // size * size
        for page in batch.table[row][first // 16 : max(last, 0) // 16]:
            batch.v_pages[page] = math.nan
    torch.testing.assert_close(attend(batch, kind, variant)[0], want.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_decode_evaluates_no_mask_in_marked_tiles(kv_dtype):
    """With all tiles marked, all keys of the tiles on the list are seen."""
    sparse = Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx >= 64) & (kv_idx % 3 == 0))
    in_tiles = Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= 64)
    batch = make("decode", 4) if kv_dtype is None else in_eight_bits(make("decode", 4), kv_dtype)
    inputs = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens)
    options = {"scale": batch.scale, "workspace": Workspace(batch.q.device)}
    found = []
    for variant, mark in ((sparse, True), (in_tiles, False), (sparse, False)):
        visited = lists_of(batch, "decode", variant)
        if mark:
            visited.tiles.copy_(number_of(visited.tiles) + MASK_HIDES_NOTHING.value)
        options |= {"variant": compile_variant(variant, 16, batch.q.device), "visited": visited}
        found.append(paged_decode(*inputs, **options)[0])
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.01


@pytest.mark.interpreter
@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch-invariant"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_lists_fit_the_launch(kind, invariant):
    """What `visited_tiles` makes is what `paged_attention` takes for the same arguments."""
    variant, batch = built_in.sinks_and_window(4, 16), make(kind, 4)
    compiled, room = compile_variant(variant, 16, batch.q.device), Workspace(batch.q.device)
    begins = None if kind == "decode" else batch.cu_seqlens_q
    options = {"max_query_len": max(batch.counts), "workspace": room, "batch_invariant": invariant, "variant": compiled}
    visited = visited_tiles(batch.q, batch.k_pages, batch.page_table, begins, batch.seq_lens, **options)
    assert visited is not None and visited.counts[:, :, 1].max() > 0
    out, _ = paged_attention(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, begins, batch.seq_lens,
        scale=batch.scale, visited=visited, **options,
    )  # fmt: skip
    torch.testing.assert_close(out, double(variant, batch)[0].float(), atol=2e-5, rtol=2e-5)
    inputs, held = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, begins, batch.seq_lens), {}
    for _ in range(2):
        same, _ = paged_attention(*inputs, scale=batch.scale, work_lists=held, **options)
        assert torch.equal(same, out)
        assert [(lists.block_m, lists.block_n) for lists in held.values()] == [(visited.block_m, visited.block_n)]
    other = visited._replace(block_n=visited.block_n * 2)
    with pytest.raises(ValueError, match="visited_tiles"):
        paged_attention(
            batch.q, batch.k_pages, batch.v_pages, batch.page_table, begins, batch.seq_lens,
            scale=batch.scale, visited=other, **options,
        )  # fmt: skip


@pytest.mark.interpreter
def test_without_a_mask_there_are_no_lists():
    batch = make("decode", 4)
    compiled, room = compile_variant(Variant(window=8, softcap=3.0), 16, batch.q.device), Workspace(batch.q.device)
    options = {"max_query_len": 1, "workspace": room, "variant": compiled}
    assert visited_tiles(batch.q, batch.k_pages, batch.page_table, None, batch.seq_lens, **options) is None


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths():
    variant, batch = built_in.sinks_and_window(4, 16), make("decode", 4, "cuda")
    compiled, room = compile_variant(variant, 16, batch.q.device), Workspace(batch.q.device)
    table, lengths = batch.page_table, batch.seq_lens
    options = {"max_query_len": 1, "workspace": room, "variant": compiled}

    def step() -> torch.Tensor:
        visited = visited_tiles(batch.q, batch.k_pages, table, None, lengths, **options)
        inputs = (batch.q, batch.k_pages, batch.v_pages, table, None, lengths)
        return paged_attention(*inputs, scale=batch.scale, visited=visited, **options)[0]

    lengths.fill_(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths.copy_(batch.seq_lens)
    graph.replay()
    torch.testing.assert_close(out, double(variant, batch)[0].float(), atol=2e-5, rtol=2e-5)
