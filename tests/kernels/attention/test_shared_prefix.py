"""Decode of groups of rows that share prefixes against dense attention, row by row."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch

from hf_fastattn.kernels.attention import configs, shared_prefix
from hf_fastattn.kernels.attention.append import rope_append
from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.cases import Batch, assert_attention, make_batch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Tokens of a prefix, and of each row's suffix; None is a row without keys.
Group = tuple[int, list[int | None]]
State = tuple[torch.Tensor, torch.Tensor]


def make_shared(rows_of: Sequence[Group], /, **options) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Rows over pages as `make_batch` lays them out, those of a group in the prefix pages of its first row with keys.

    What the others held in place of them is NaN.
    """
    pasts = [-1 if suffix is None else prefix + suffix - 1 for prefix, suffixes in rows_of for suffix in suffixes]
    batch = make_batch([1] * len(pasts), pasts, scattered=True, **options)
    page, row = batch.k_pages.shape[1], 0
    for prefix, suffixes in rows_of:
        assert prefix % page == 0
        active = [row + i for i, suffix in enumerate(suffixes) if suffix is not None]
        for other in active[1:]:
            for pages in (batch.k_pages, batch.v_pages):
                pages[batch.table[other][: prefix // page]] = math.nan
            batch.table[other][: prefix // page] = batch.table[active[0]][: prefix // page]
            for own, common in zip(batch.rows[other], batch.rows[active[0]], strict=True):
                own[:prefix] = common[:prefix]
        row += len(suffixes)
    starts = [0, *itertools.accumulate(len(suffixes) for _, suffixes in rows_of)]
    device = batch.q.device
    return batch, torch.tensor(starts).int().to(device), torch.tensor([prefix for prefix, _ in rows_of]).int().to(device)


def check(
    rows_of: Sequence[Group],
    softcap: float | None = None,
    workspace: Workspace | None = None,
    /,
    most: int | None = None,
    hopper: bool = False,
    **options,
) -> State:
    batch, starts, prefixes = make_shared(rows_of, **options)
    most = most or max(len(suffixes) for _, suffixes in rows_of)
    got = paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts, prefixes,
        max_group_rows=most, scale=batch.scale, softcap=softcap, workspace=workspace, hopper=hopper,
    )  # fmt: skip
    assert_attention(batch, got, softcap=softcap)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("ratio", "dim", "page", "dtype"), [(1, 64, 16, BF16), (4, 128, 16, FP32), (7, 96, 32, FP16), (4, 128, 16, BF16)]
)
def test_shapes(ratio, dim, page, dtype):
    options = {"ratio": ratio, "dim": dim, "page": page, "dtype": dtype}
    check([(2 * page, [3, 20, 1]), (page, [5])], **options)
    check([(5 * page, [70])], groups=1, **options)


@pytest.mark.interpreter
def test_empty_states():
    groups: list[Group] = [(32, [0, 0]), (0, [5, None]), (16, [None, 0, 9]), (48, [None]), (0, [1]), (16, [])]
    out, lse = check([*groups, (32, [4, 4])], page=16, dim=32, dtype=BF16)
    for row in (3, 4, 7):
        assert not out[row].any() and bool((lse[row] == -torch.inf).all())


@pytest.mark.interpreter
def test_rows_past_the_last_group_share_nothing():
    batch, starts, prefixes = make_shared([(16, [3, 30]), (0, [20]), (0, [None])], page=16, dim=32, dtype=BF16)
    got = paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts[:2].clone(), prefixes[:1].clone(),
        max_group_rows=2, scale=batch.scale,
    )  # fmt: skip
    assert_attention(batch, got)


def test_parts_of_suffixes():
    """Of 64 rows of 8 kv heads, of 16, of 4, of one, and of more than there are programs."""
    tile = configs.suffix_tile(90, 2, 128, 64, 132)
    assert [configs.parts_of_suffixes(tile, rows * 8, 132) for rows in (64, 16, 4, 1, 1000)] == [2, 8, 32, 32, 2]


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
def test_query_blocks(rows, monkeypatch):
    """More rows than a tile holds, with heads that do not divide it."""
    tile = configs.Tile(32, 32, 4, 3)
    monkeypatch.setattr(shared_prefix, "shared_prefix_tile", lambda *args: tile)
    check([(80, [row % 3 for row in range(rows)]), (0, [40, 3])], groups=1, ratio=5, page=16, dim=32, dtype=BF16)


@pytest.mark.interpreter
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_prefixes_and_suffixes_in_many_parts(parts, monkeypatch):
    """Suffixes of fewer parts than there are programs for, of as many, and of more."""
    monkeypatch.setattr(shared_prefix, "parts_of_suffixes", lambda *args: parts)
    monkeypatch.setattr(shared_prefix, "shared_prefix_tile", lambda *args: configs.Tile(16, 16, 4, 3))
    check([(400, [130])], groups=1, page=16, dim=32, dtype=BF16)
    check([(160, [20, 700]), (48, [90])], groups=2, page=16, dim=32, dtype=BF16)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "softcap", "factor"), [(BF16, 5.0, 1.0), (FP32, 50.0, 30.0), (BF16, None, 30.0)])
def test_softcap_and_extreme_scores(dtype, softcap, factor):
    check([(64, [20, 1, 0]), (16, [7, 80])], softcap, page=16, groups=1, dim=64, dtype=dtype, factor=factor)


@pytest.mark.interpreter
def test_strides():
    check([(32, [3, 20])], page=16, dim=32, q_layout="fused", heads_first=True)
    check([(32, [3, 20])], page=16, dim=32, q_layout="transposed")


@pytest.mark.interpreter
def test_a_workspace_serves_one_launch_after_another():
    workspace, options = Workspace(torch.device("cpu")), {"page": 16, "dim": 32, "ratio": 4, "dtype": BF16}
    groups: list[Group] = [(96, [5, 17]), (16, [300, 1])]
    first = check(groups, None, workspace, **options)
    *_, counters = workspace.split_kv(1, 16, 32)
    assert not counters.any(), "the next launch counts from what this one left"
    batch = make_batch([1] * 3, [5, 300, 64], **options)
    got = paged_decode(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, scale=batch.scale, workspace=workspace
    )
    assert_attention(batch, got)
    for before, after in zip(first, check(groups, None, workspace, **options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.interpreter
@pytest.mark.parametrize("change", ["rows", "starts", "groups", "most"])
def test_what_does_not_fit_is_refused(change):
    batch, starts, prefixes = make_shared([(16, [3, 5])], page=16)
    table, most = batch.page_table, 2
    if change == "rows":
        table = table[:1]
    elif change == "starts":
        starts = starts[:1]
    elif change == "groups":
        starts, prefixes = starts[:1], prefixes[:0]
    else:
        most = 0
    with pytest.raises(ValueError, match="one a row|one more|must be positive"):
        paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, table, batch.seq_lens, starts, prefixes, max_group_rows=most, scale=1.0
        )


def make_nested(
    tree: Sequence[tuple[int, Sequence[Group]]], empty: int = 0, /, **options
) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Groups within groups: of each `(prefix, groups)` all rows share a prefix, and the rows of each group one more.

    `empty` groups without rows or prefix follow in each level.
    """
    inner = [(above + prefix, suffixes) for above, groups in tree for prefix, suffixes in groups]
    batch, starts, lens = make_shared(inner, **options)
    page, row = batch.k_pages.shape[1], 0
    outer = [0]
    for above, groups in tree:
        rows = range(row, row + sum(len(suffixes) for _, suffixes in groups))
        active = [other for other in rows if batch.lengths[other]]
        for other in active[1:]:
            was = batch.table[other][: above // page]
            if was != batch.table[active[0]][: above // page]:
                for pages in (batch.k_pages, batch.v_pages):
                    pages[was] = math.nan
            batch.table[other][: above // page] = batch.table[active[0]][: above // page]
            for own, common in zip(batch.rows[other], batch.rows[active[0]], strict=True):
                own[:above] = common[:above]
        row = rows.stop
        outer.append(row)
    # Entries without a group: rows past the last one share nothing.
    size = max(len(inner), len(tree)) + empty
    outer += [outer[-1]] * (size + 1 - len(outer))
    inner_starts = starts.tolist() + [row] * (size + 1 - len(starts))
    lens_outer = [above for above, _ in tree] + [0] * (size - len(tree))
    lens_inner = lens.tolist() + [0] * (size - len(inner))
    device = batch.q.device
    return (
        batch,
        torch.tensor([outer, inner_starts], dtype=torch.int32, device=device),
        torch.tensor([lens_outer, lens_inner], dtype=torch.int32, device=device),
    )


def check_nested(
    tree: Sequence[tuple[int, Sequence[Group]]], most: int = 8, empty: int = 0, /, hopper: bool = False, **options
) -> None:
    batch, starts, lens = make_nested(tree, empty, **options)
    for levels in ((starts, lens), (starts[1].clone(), lens[1].clone())):
        got = paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, *levels,
            max_group_rows=most, scale=batch.scale, hopper=hopper,
        )  # fmt: skip
        assert_attention(batch, got)


NESTED: list[tuple[int, list[Group]]] = [
    (48, [(32, [3, 20, 1]), (0, [5]), (16, [0, 0, None])]),
    (0, [(16, [9, 4])]),
    (32, [(64, [None, 40])]),
    (16, [(0, [None])]),
]


@pytest.mark.interpreter
def test_prefixes_within_prefixes(monkeypatch):
    check_nested(NESTED, page=16, dim=32, dtype=BF16)
    monkeypatch.setattr(shared_prefix, "shared_prefix_tile", lambda *args: configs.Tile(16, 16, 4, 3))
    check_nested(NESTED, 2, 5, groups=1, ratio=5, page=16, dim=32, dtype=FP32)
    # Each level in many parts.
    check_nested([(160, [(240, [70, 3]), (64, [20])])], groups=1, page=16, dim=32, dtype=BF16)


@pytest.mark.interpreter
def test_three_levels():
    """A prompt of all rows above the groups of two levels: what the second of them holds is that of the first."""
    batch, starts, lens = make_nested([(96, [(32, [3, 20]), (16, [5, 1, 40])])], page=16, dim=32, dtype=BF16)
    starts = torch.cat((starts[:1], starts))
    lens = torch.cat((torch.tensor([[64, 0]], dtype=torch.int32), lens))
    got = paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts, lens,
        max_group_rows=5, scale=batch.scale,
    )  # fmt: skip
    assert_attention(batch, got)
    with pytest.raises(ValueError, match="4 levels"):
        paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens,
            torch.cat((starts[:1], starts)), torch.cat((lens[:1], lens)), max_group_rows=5, scale=batch.scale,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "dtype"), [(4, BF16), (7, FP16), (1, FP32)])
def test_prefixes_within_prefixes_on_a_gpu(ratio, dtype):
    tree: list[tuple[int, list[Group]]] = [
        (4096, [(512, [100, 5, 0, 1]), (48, [None, 7, 300, 3]), (0, [50]), (1024, [3] * 40)]),
        (0, [(2048, [9, 4])]),
        (1024, [(0, [None, 70]), (16, [1, 2])]),
    ]
    for most in (1, 64):
        check_nested(tree, most, 3, ratio=ratio, dim=128, page=16, dtype=dtype, device="cuda")


def random_groups(random: Random, page: int, rows: int, longest: int) -> list[Group]:
    """Groups of 0 to 40 rows, and now and then no prefix, no suffix or no keys at all."""
    groups: list[Group] = []
    while rows > 0:
        size = min(random.choice((0, 1, 2, 3, 8, 16, 33, 40)), rows)
        prefix = random.choice((0, 1, 2, random.randint(0, longest // page))) * page
        lengths = (0, 1, page, 127, 128, random.randint(1, 600))
        suffixes = [random.choice(lengths) if random.random() > 0.1 else None for _ in range(size)]
        groups.append((prefix, [1 if prefix == 0 and suffix == 0 else suffix for suffix in suffixes]))
        rows -= size
    return groups


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ratio", "dim", "page", "dtype"),
    [(4, 128, 16, BF16), (1, 64, 16, FP16), (7, 96, 32, BF16), (4, 128, 64, FP32), (8, 256, 16, BF16)],
)
def test_sweep(ratio, dim, page, dtype):
    for seed in range(10):
        random = Random(f"{ratio} {dim} {seed}")
        # Few specialisations: one for small batches, one for large ones, whose groups are filled up with empty ones.
        rows, most, softcap = (random.choice((1, 5, 16)), 4, None) if seed % 2 else (60, 40, 30.0)
        groups = random_groups(random, page, rows, 3000)
        groups += [(0, [])] * (16 * (1 if seed % 2 else 4) - len(groups))
        layout = random.choice(("contiguous", "fused", "transposed"))
        options = {"ratio": ratio, "dim": dim, "page": page, "dtype": dtype, "heads_first": random.random() < 0.3}
        check(groups, softcap, most=most, q_layout=layout, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "prefix", "count"), [(1, 8192, 1), (4, 8192, 1), (64, 4096, 1), (200, 1024, 1), (8, 2048, 6)]
)
def test_many_samples_of_long_prompts(rows, prefix, count):
    suffixes: list[int | None] = [(37 * row) % 200 for row in range(rows)]
    check([(prefix, suffixes)] * count, ratio=4, dim=128, page=16, groups=4, dtype=BF16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("most", [1, 64])
def test_a_captured_graph_follows_lengths_and_groups(most):
    options = {"ratio": 4, "dim": 128, "page": 16, "dtype": BF16, "device": "cuda"}
    batch, starts, prefixes = make_shared([(2048, [100, 5, 0]), (512, [3000, None, 7]), (0, [50, 1])], **options)
    page_table, seq_lens, workspace = batch.page_table, batch.seq_lens, Workspace(batch.q.device)

    def launch() -> State:
        return paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, page_table, seq_lens, starts, prefixes,
            max_group_rows=most, scale=batch.scale, workspace=workspace,
        )  # fmt: skip

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch()

    def replay(lengths: list[int], bounds: list[int], shared: list[int]) -> Callable[[], None]:
        seq_lens.copy_(torch.tensor(lengths))
        starts.copy_(torch.tensor(bounds))
        prefixes.copy_(torch.tensor(shared))
        graph.replay()
        rows = [(keys[:n], values[:n]) for (keys, values), n in zip(batch.rows, lengths, strict=True)]
        return lambda: assert_attention(dataclasses.replace(batch, lengths=lengths, rows=rows), got)

    first = batch.lengths
    for step in (
        (first, [0, 3, 6, 8], [2048, 512, 0]),
        ([2049, 2048, 2048, 512, 0, 519, 50, 1], [0, 3, 6, 8], [2048, 512, 0]),
        ([2148, 0, 2048, 3512, 0, 513, 3, 0], [0, 3, 6, 8], [1024, 16, 0]),
        ([2148, 2053, 2048, 3512, 0, 519, 50, 1], [0, 2, 3, 3], [2048, 0, 0]),
        ([0] * 8, [0, 3, 6, 8], [2048, 512, 0]),
        (first, [0, 3, 6, 8], [2048, 512, 0]),
    ):
        replay(*step)()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "prefix", "hopper"), [(64, 512, True), (64, 512, False), (16, 4096, False), (64, 4096, True)]
)
def test_suffixes_begin_when_their_keys_are_there(rows, prefix, hopper):
    """In a captured chain of layers: what is appended changes between replays, and was NaN before."""
    heads, groups, dim, layers = 16, 8, 128, 8
    suffixes: list[int | None] = [50 + row % 3 for row in range(rows)]
    batches = [
        make_shared([(prefix, suffixes)], ratio=heads // groups, groups=groups, dim=dim, page=16, dtype=BF16, device="cuda")
        for _ in range(layers)
    ]
    workspace, cos = Workspace(batches[0][0].q.device), torch.ones(rows, dim, dtype=BF16, device="cuda")
    new = [[torch.empty(rows, count, dim, dtype=BF16, device="cuda") for count in (heads, groups, groups)] for _ in batches]
    lists: WorkLists = {}

    # Made on the host, which a capture does not allow.
    lengths, tables = [batch.seq_lens for batch, _, _ in batches], [batch.page_table for batch, _, _ in batches]
    last = [lens.long() - 1 for lens in lengths]
    pages = [table.gather(1, end[:, None] // 16)[:, 0] for table, end in zip(tables, last, strict=True)]
    slots = [page.long() * 16 + end % 16 for page, end in zip(pages, last, strict=True)]

    def chain(shared: bool) -> list[torch.Tensor]:
        lists.clear()
        found = []
        for (batch, starts, prefixes), inputs, table, lens, places in zip(batches, new, tables, lengths, slots, strict=True):
            q = rope_append(*inputs, cos, torch.zeros_like(cos), batch.k_pages, batch.v_pages, places)
            where = (q, batch.k_pages, batch.v_pages, table, lens)
            if shared:
                out, _ = paged_decode_shared(
                    *where, starts, prefixes, max_group_rows=rows, scale=batch.scale, workspace=workspace, hopper=hopper,
                    work_lists=lists,
                )  # fmt: skip
            else:
                out, _ = paged_decode(*where, scale=batch.scale, workspace=workspace)
            found.append(out)
        return found

    for inputs in new:
        for x in inputs:
            x.normal_()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(True)
    for _ in range(3):
        for (batch, _, _), inputs, places in zip(batches, new, slots, strict=True):
            for x in inputs:
                x.normal_()
            for pages in (batch.k_pages, batch.v_pages):
                pages.view(-1, groups, dim)[places] = math.nan
        graph.replay()
        replayed = [out.clone() for out in got]
        for ours, plain in zip(replayed, chain(False), strict=True):
            torch.testing.assert_close(ours, plain, atol=0.02, rtol=0.02)
