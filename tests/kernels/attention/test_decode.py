"""Split-KV decode and short appends over pages against dense attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_fastattn.kernels.attention import decode
from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.cases import Batch, assert_attention, make_batch
from tests.kernels.sweep import SHAPES, SHORT, batches, length, shapes
from tests.tools.combinations import in_turn, pairwise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(
    batch: Batch, *, window: int | None = None, softcap: float | None = None, workspace: Workspace | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    options = {} if set(batch.counts) == {1} else {"cu_seqlens_q": batch.cu_seqlens_q, "max_query_len": max(batch.counts)}
    got = paged_decode(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens,
        scale=batch.scale, window=window, softcap=softcap, workspace=workspace, **options,
    )  # fmt: skip
    assert_attention(batch, got, window=window, softcap=softcap)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_turn(
        [(1, 64, 16), (2, 16, 32), (4, 128, 16), (5, 80, 16), (7, 96, 64), (8, 64, 16), (16, 256, 32)], [BF16, FP16, FP32]
    ),
)
def test_shapes(shape, dtype):
    ratio, dim, page = shape
    options = {"ratio": ratio, "dim": dim, "page": page, "dtype": dtype}
    check(make_batch([1, 1, 1], [0, 63, 100], scattered=True, **options))
    check(make_batch([1], [page], groups=1, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window(window, softcap):
    batch = make_batch([1, 1, 1], [3, 64, 150], page=16, ratio=4, dim=32, window=window, scattered=True, dtype=BF16)
    check(batch, window=window, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "softcap", "factor"), [(BF16, 5.0, 1.0), (FP16, 50.0, 1.0), (FP32, 50.0, 30.0)])
def test_softcap(dtype, softcap, factor):
    check(make_batch([1, 1, 1], [20, 63, 130], page=16, groups=1, dim=64, dtype=dtype, factor=factor), softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 20])
def test_rows_without_keys(window):
    batch = make_batch([1, 1, 1, 1], [-1, 40, -1, 0], page=16, dim=32, dtype=BF16, window=window)
    out, lse = check(batch, window=window)
    assert not out[0].any() and bool((lse[2] == -torch.inf).all())


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 16])
def test_a_row_of_many_queries_and_no_key(window):
    out, lse = check(make_batch([5, 43], [60, -43], page=16, dim=32, dtype=BF16, window=window), window=window)
    assert not out[5:].any() and bool((lse[5:] == -torch.inf).all())


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("ratio", [1, 5])
def test_short_append(window, ratio):
    options = {"page": 16, "ratio": ratio, "dim": 32, "dtype": BF16, "scattered": True, "window": window}
    check(make_batch([4, 0, 1, 3], [90, 20, 0, 5], **options), window=window)
    check(make_batch([17], [70], **options), window=window)


@pytest.mark.interpreter
@pytest.mark.parametrize("q_layout", ["fused", "transposed"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_strides(q_layout, heads_first):
    check(make_batch([1, 1], [30, 70], page=16, dim=32, q_layout=q_layout, heads_first=heads_first, scattered=True))


@pytest.mark.interpreter
def test_extreme_scores():
    check(make_batch([1, 1], [100, 200], page=16, dim=64, factor=30.0, dtype=BF16))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("processors", "counts", "window"), pairwise([1, 2, 4, 7, 11], [[1] * 8, [3, 1, 1, 0, 2, 9, 1, 1]], [None, 100])
)
def test_long_rows_between_short_ones(counts, processors, window):
    """Every item counts for more than its keys in the list, so that ranges begin and end anywhere, also past its keys."""
    lengths = [1, 700, 0, 5, 64, 330, 2, 65]
    pasts = [length - count for length, count in zip(lengths, counts, strict=True)]
    batch = make_batch(counts, pasts, page=16, ratio=4, groups=2, dim=32, dtype=BF16, window=window)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = processors
    check(batch, workspace=workspace, window=window)
    assert not workspace.split_kv(1, 16, 32)[2].any(), "counters are zero between launches"


@pytest.mark.interpreter
@pytest.mark.parametrize(("processors", "counts", "window"), pairwise([1, 2, 3], [[1] * 6, [2, 1, 9, 1, 0, 5]], [None, 100]))
def test_whole_rows_of_about_one_length(counts, processors, window):
    """With 6 rows of 2 kv heads on 3 multiprocessors, each of 6 programs takes two whole items."""
    lengths = [300, 257, 319, 280, 260, 311]
    pasts = [length - count for length, count in zip(lengths, counts, strict=True)]
    batch = make_batch(counts, pasts, page=16, ratio=4, groups=2, dim=32, dtype=BF16, window=window)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = processors
    check(batch, workspace=workspace, window=window)
    assert not workspace.split_kv(1, 16, 32)[2].any()


@pytest.mark.interpreter
@pytest.mark.parametrize(("count", "block_m", "parts"), [(3, 16, 8), (12, 64, 4), (40, 64, 3 * 4)])
def test_no_more_parts_than_are_merged_in_time(count, block_m, parts):
    """Of 16 tiles: for 12 tokens of 4 heads at most 5 parts, so 4 of 4 tiles, whatever the GPU; for 3 tokens 11, so 8."""
    batch = make_batch([count], [1000 - count], page=16, ratio=4, groups=2, dim=32, dtype=BF16)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = 32
    _, sums, _ = workspace.split_kv(2 * 64, block_m, 32)
    sums.fill_(torch.nan)
    check(batch, workspace=workspace)
    assert int((~sums.view(-1, block_m, 2)[:, 0, 0].isnan()).sum()) == 2 * parts


@pytest.mark.interpreter
def test_a_workspace_serves_one_launch_after_another():
    options = {"page": 16, "dim": 32, "ratio": 4, "dtype": BF16}
    workspace = Workspace(torch.device("cpu"))
    batch = make_batch([1] * 5, [5, 300, 17, 64, 1], **options)
    first = check(batch, workspace=workspace)
    check(make_batch([1, 3], [200, 100], **options), workspace=workspace)
    for before, after in zip(first, check(batch, workspace=workspace), strict=True):
        assert torch.equal(before, after)
    assert not workspace.split_kv(1, 16, 64)[2].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("change", ["dim", "dtype", "rows", "strides"])
def test_what_does_not_fit_is_refused(change):
    batch = make_batch([1, 1], [3, 5], dim=20 if change == "dim" else 16)
    q, k_pages, v_pages, page_table = batch.q, batch.k_pages, batch.v_pages, batch.page_table
    if change == "dtype":
        q = q.half()
    elif change == "rows":
        q = q[:1]
    elif change == "strides":
        v_pages = v_pages.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="head dim 20|must be of one dtype|one a row|must be alike"):
        paged_decode(q, k_pages, v_pages, page_table, batch.seq_lens, scale=1.0)


def check_invariance(batch: Batch, **features) -> None:
    """Each row alone, in a narrower table and with its pages elsewhere, gives the bits that it gives among the others."""

    def run(rows: slice, k_pages, v_pages, page_table):
        return paged_decode(
            batch.q[rows], k_pages, v_pages, page_table[rows], batch.seq_lens[rows],
            scale=batch.scale, batch_invariant=True, **features,
        )  # fmt: skip

    together = run(slice(None), batch.k_pages, batch.v_pages, batch.page_table)
    assert_attention(batch, together, **features)
    order = torch.randperm(batch.k_pages.shape[0], generator=torch.Generator().manual_seed(3)).to(batch.q.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    moved = torch.where(batch.page_table >= 0, place[batch.page_table.long()], -1).int()
    for row, keys in enumerate(batch.lengths):
        columns = max(-(-keys // batch.k_pages.shape[1]), 1)
        alone = run(slice(row, row + 1), batch.k_pages[order], batch.v_pages[order], moved[:, :columns])
        for ours, others in zip(alone, together, strict=True):
            assert torch.equal(ours[0], others[row])


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_batch_invariance(dtype, window, monkeypatch):
    monkeypatch.setattr(decode, "INVARIANT_KEYS", 128)
    batch = make_batch([1, 1, 1], [500, 3, 300], page=16, ratio=4, dim=64, dtype=dtype, scattered=True, window=window)
    check_invariance(batch, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=str)
def test_batch_invariance_of_long_rows(shape):
    for random, options, features in batches(shape, 4):
        pasts = [length(random, shape.page) - 1 for _ in range(random.randint(2, 60))]
        check_invariance(make_batch([1] * len(pasts), pasts, **options), **features)


@pytest.mark.gpu
@shapes(SHAPES)
def test_sweep(shape):
    for random, options, features in batches(shape, 12):
        pasts = [random.choice((-1, 0)) if random.random() < 0.1 else length(random, shape.page) - 1 for _ in range(16)]
        pasts = pasts[: random.randint(1, 16)]
        check(make_batch([1] * len(pasts), pasts, **options), **features)


@pytest.mark.gpu
@shapes(SHAPES[:1])
def test_sweep_of_large_batches(shape):
    for random, options, features in batches(shape, 4):
        pasts = [length(random, shape.page, 1500) - 1 for _ in range(random.randint(129, 256))]
        check(make_batch([1] * len(pasts), pasts, **options), **features)


@pytest.mark.gpu
@shapes(SHORT)
def test_sweep_of_short_appends(shape):
    for random, options, features in batches(shape, 12):
        counts = [8, *(random.choice((0, 1, 2, 5, 8)) for _ in range(random.randint(0, 15)))]
        check(make_batch(counts, [length(random, shape.page) - 1 for _ in counts], **options), **features)


@pytest.mark.gpu
def test_pages_beyond_what_32_bits_count():
    # 2^31 elements in front of the pages in use.
    options = {"ratio": 4, "dim": 128, "page": 16, "dtype": BF16, "spare": 2**31 // (16 * 2 * 128), "device": "cuda"}
    check(make_batch([1, 1], [100, 1000], **options))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths():
    options = {"ratio": 4, "dim": 128, "page": 16, "dtype": BF16, "scattered": True, "device": "cuda"}
    batch = make_batch([1, 1, 1], [2999, 49, 4095], **options)
    page_table, seq_lens = batch.page_table, batch.seq_lens
    workspace = Workspace(batch.q.device)

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        pages = batch.k_pages, batch.v_pages
        return paged_decode(batch.q, *pages, page_table, seq_lens, scale=batch.scale, workspace=workspace)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch()
    for lengths in ([3000, 50, 4096], [1, 1, 1], [2999, 33, 0], [3000, 50, 4096]):
        seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        rows = [(keys[:n], values[:n]) for (keys, values), n in zip(batch.rows, lengths, strict=True)]
        assert_attention(dataclasses.replace(batch, lengths=lengths, rows=rows), got)
