"""The Gluon prefill on Hopper, against the same oracle and under the same criterion as the Triton one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.cases import Batch, assert_attention, make_batch
from tests.kernels.sweep import BF16, FP16, LONGEST, Shape, batches, length, shapes

pytestmark = pytest.mark.gpu

SHAPES = (
    Shape(4, 128, 16, BF16),
    Shape(1, 128, 64, BF16),
    Shape(7, 128, 16, FP16),
    Shape(16, 128, 256, BF16),
    Shape(5, 64, 32, BF16),
    Shape(8, 64, 128, FP16),
    Shape(2, 256, 8, BF16),
)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def check(batch: Batch, processors: int = 132) -> None:
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

    pages = (batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
    got = hopper_prefill(batch.q.contiguous(), *pages, scale=batch.scale, processors=processors)
    assert_attention(batch, got)


@shapes(SHAPES)
def test_sweep(shape):
    for random, options, _ in batches(shape, 8):
        rows = random.randint(1, 8)
        counts = [random.choice((0, 1, 2, 31, 32, 33, 128, 129, length(random, shape.page, 1500))) for _ in range(rows)]
        pasts = [random.choice((0, 0, length(random, shape.page, LONGEST))) for _ in counts]
        check(make_batch(counts, pasts, **options), processors=random.choice((1, 7, 132)))


def test_rows_that_see_no_key():
    check(make_batch([5, 40, 1], [-3, 0, -1], page=16, ratio=4, dim=128, dtype=BF16, scattered=True, device="cuda"))


def test_a_row_of_many_queries_and_no_key():
    check(make_batch([70, 442], [100, -442], page=16, ratio=4, dim=128, dtype=BF16, scattered=True, device="cuda"))


def test_many_rows():
    counts = [1 + 13 * i % 40 for i in range(300)]
    check(make_batch(counts, [7 * i % 100 for i in range(300)], page=16, dim=128, ratio=4, dtype=BF16, device="cuda"))


def test_repeats_bitwise():
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

    batch = make_batch([700, 3, 129], [0, 900, 4000], page=16, ratio=4, dim=128, dtype=BF16, scattered=True, device="cuda")
    pages = (batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
    runs = [hopper_prefill(batch.q, *pages, scale=batch.scale, processors=132) for _ in range(3)]
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)


def test_a_captured_graph_follows_the_lengths():
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

    batch = make_batch([300, 50, 200], [0, 900, 400], page=16, ratio=4, dim=128, dtype=BF16, device="cuda")
    begins, lengths = batch.cu_seqlens_q, batch.seq_lens
    pages = (batch.k_pages, batch.v_pages, batch.page_table, begins, lengths)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        hopper_prefill(batch.q, *pages, scale=batch.scale, processors=132)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hopper_prefill(batch.q, *pages, scale=batch.scale, processors=132)
    for counts in ([300, 50, 200], [100, 250, 200], [1, 548, 1]):
        begins.copy_(torch.tensor([0, *counts]).cumsum(0))
        graph.replay()
        assert_attention(dataclasses.replace(batch, counts=counts), (out, lse))


def test_batch_invariance():
    from hf_fastattn.kernels.attention.paged import paged_attention

    batch = make_batch([700, 3, 129], [0, 900, 4000], page=16, ratio=4, dim=128, dtype=BF16, scattered=True, device="cuda")
    options = {"scale": batch.scale, "batch_invariant": True, "max_query_len": 700}
    for hopper in (False, True):
        batched = (batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
        together, _ = paged_attention(batch.q, batch.k_pages, batch.v_pages, *batched, **options, hopper=hopper)
        for row, (first, last) in enumerate(zip([0, 700, 703], [700, 703, 832], strict=True)):
            begins = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
            alone = (batch.page_table[row : row + 1], begins, batch.seq_lens[row : row + 1])
            out, _ = paged_attention(batch.q[first:last], batch.k_pages, batch.v_pages, *alone, **options, hopper=hopper)
            assert torch.equal(out, together[first:last])
