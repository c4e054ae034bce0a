"""The page-by-page peer against dense attention."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.eval.kernel_speed.page_by_page import page_by_page
from tests.kernels.cases import Batch, assert_close, dense_attention, make_batch


def check(batch: Batch) -> torch.Tensor:
    out = page_by_page(batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, scale=batch.scale)
    plain, want = (dense_attention(batch, dtype)[0] for dtype in (batch.q.dtype, torch.float64))
    assert_close("output", out, plain, want)
    return out


@pytest.mark.interpreter
@pytest.mark.parametrize(("ratio", "dim", "page", "dtype"), [(1, 64, 16, torch.float32), (3, 40, 64, torch.bfloat16)])
def test_rows_of_all_lengths(ratio, dim, page, dtype):
    batch = make_batch([1] * 4, [0, 31, 32, 99], ratio=ratio, groups=2, dim=dim, page=page, dtype=dtype, scattered=True)
    check(batch)


@pytest.mark.interpreter
def test_a_row_without_keys():
    assert not check(make_batch([1, 1], [-1, 5], page=16, dim=32))[0].any()


@pytest.mark.gpu
def test_on_a_gpu():
    options = {"ratio": 4, "dim": 128, "page": 16, "dtype": torch.bfloat16, "device": "cuda"}
    batch = make_batch([1] * 5, [4095, 0, 17, 640, 2000], scattered=True, **options)
    check(batch)
