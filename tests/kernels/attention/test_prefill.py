"""Prefill and append of ragged rows over pages against dense attention."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.attention.prefill import paged_prefill
from tests.kernels.cases import Batch, assert_attention, make_batch
from tests.kernels.sweep import LONGEST, SHAPES, SHORT, batches, length, shapes
from tests.tools.combinations import in_turn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(batch: Batch, *, window: int | None = None, softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    got = paged_prefill(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens,
        scale=batch.scale, window=window, softcap=softcap,
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
    options = {"ratio": ratio, "dim": dim, "page": page, "dtype": dtype, "scattered": True, "groups": 1}
    check(make_batch([7, 1, 0, 5], [0, 63, 5, 30], **options))
    check(make_batch([33, 9], [1, 40], **options))


@pytest.mark.interpreter
def test_many_tiles():
    check(make_batch([150, 70], [0, 100], page=16, dim=32, ratio=1, dtype=BF16))


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window(window, softcap):
    options = {"page": 16, "dim": 32, "window": window, "scattered": True, "dtype": BF16}
    check(make_batch([5, 1, 40], [150, 64, 3], ratio=4, groups=1, **options), window=window, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "softcap", "factor"), [(BF16, 5.0, 1.0), (FP16, 50.0, 1.0), (FP32, 50.0, 30.0)])
def test_softcap(dtype, softcap, factor):
    check(make_batch([5, 1, 40], [100, 64, 3], page=16, groups=1, dim=64, dtype=dtype, factor=factor), softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 20])
def test_rows_without_queries_and_without_keys(window):
    batch = make_batch([0, 1, 30, 1, 0], [0, -1, 40, -1, 70], page=16, dim=32, dtype=BF16, window=window)
    out, lse = check(batch, window=window)
    assert not out[0].any() and bool((lse[-1] == -torch.inf).all())


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 16])
def test_a_row_of_many_queries_and_no_key(window):
    out, lse = check(make_batch([21, 200], [40, -200], page=16, dim=32, dtype=BF16, window=window), window=window)
    assert not out[21:].any() and bool((lse[21:] == -torch.inf).all())


@pytest.mark.interpreter
@pytest.mark.parametrize("q_layout", ["fused", "transposed"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_strides(q_layout, heads_first):
    check(make_batch([9, 5], [30, 70], page=16, dim=32, q_layout=q_layout, heads_first=heads_first, scattered=True))


@pytest.mark.interpreter
def test_extreme_scores():
    check(make_batch([50, 3], [100, 20], page=16, dim=64, factor=30.0, dtype=BF16))


@pytest.mark.interpreter
@pytest.mark.parametrize("change", ["dim", "dtype", "rows", "strides"])
def test_what_does_not_fit_is_refused(change):
    batch = make_batch([2, 1], [3, 5], dim=20 if change == "dim" else 16)
    q, v_pages, begins = batch.q, batch.v_pages, batch.cu_seqlens_q
    if change == "dtype":
        q = q.half()
    elif change == "rows":
        begins = begins[:2]
    elif change == "strides":
        v_pages = v_pages.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="head dim 20|must be of one dtype|B \\+ 1|must be alike"):
        paged_prefill(q, batch.k_pages, v_pages, batch.page_table, begins, batch.seq_lens, scale=1.0)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 40])
def test_batch_invariance(window):
    """Each row alone gives the bits that it gives among the others."""
    counts, pasts = [70, 3, 20], [0, 90, 200]
    batch = make_batch(counts, pasts, page=16, ratio=4, dim=32, dtype=BF16, scattered=True, window=window)
    options = {"scale": batch.scale, "window": window, "batch_invariant": True}
    together = paged_prefill(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens, **options
    )
    assert_attention(batch, together, window=window)
    parts = [batch.q.split(counts), *(state.split(counts) for state in together)]
    for row, (q, *want) in enumerate(zip(*parts, strict=True)):
        alone = (batch.page_table[row : row + 1], torch.tensor([0, len(q)]).int(), batch.seq_lens[row : row + 1])
        got = paged_prefill(q, batch.k_pages, batch.v_pages, *alone, **options)
        assert all(map(torch.equal, got, want))


@pytest.mark.gpu
@shapes(SHAPES)
def test_sweep(shape):
    for random, options, features in batches(shape, 8):
        counts = [random.randint(65, LONGEST), *(length(random, shape.page, 300) for _ in range(random.randint(0, 7)))]
        counts = [0 if random.random() < 0.2 else count for count in counts[:-1]] + counts[-1:]
        random.shuffle(counts)
        pasts = [random.choice((0, length(random, shape.page, LONGEST - count + 1) - 1)) for count in counts]
        pasts = [-1 if count and random.random() < 0.1 else past for count, past in zip(counts, pasts, strict=True)]
        check(make_batch(counts, pasts, **options), **features)


@pytest.mark.gpu
@shapes(SHORT)
def test_sweep_of_few_queries(shape):
    for random, options, features in batches(shape, 12):
        counts = [1, *(random.randint(0, 2) for _ in range(min(32 // shape.ratio, 16) - 1))]
        check(make_batch(counts, [length(random, shape.page) - 1 for _ in counts], **options), **features)


@pytest.mark.gpu
def test_pages_beyond_what_32_bits_count():
    # 2^31 elements in front of the pages in use.
    options = {"ratio": 4, "dim": 128, "page": 16, "dtype": BF16, "spare": 2**31 // (16 * 2 * 128), "device": "cuda"}
    check(make_batch([100, 7], [0, 1000], **options))
