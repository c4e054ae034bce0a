"""Pages of 8 bits in plain PyTorch: how numbers are rounded, where they lie, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from hf_fastattn.kernels import ops, page_formats
from hf_fastattn.kernels.launch import check_pages
from hf_fastattn.kernels.page_formats import KV_DTYPES, dequantised, page_bytes, page_views, quantise, raw_pages

# The largest error of an element, as a share of it (e4m3: 3 bits of mantissa) or of the row's largest (int8).
ROUNDING = {"fp8": 2.0**-4, "int8": 0.5 / 127 * (1 + 2.0**-7)}


def made(kv_dtype: str, count: int = 3, page: int = 4, groups: int = 2, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    raw = torch.full((count, page_bytes(page, groups, dim)), 255, dtype=torch.uint8)
    return page_views(raw, page, groups, dim, KV_DTYPES[kv_dtype])


def read_back(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    numbers, scales = quantise(x, KV_DTYPES[kv_dtype])
    return numbers.float() * scales.float()[..., None]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 3e4, 1e30])
def test_rounding(kv_dtype: str, magnitude: float) -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    error, largest = (read_back(x, kv_dtype) - x).abs(), x.abs().amax(-1, keepdim=True)
    if kv_dtype == "fp8":
        # Below 2^-6 of the scale numbers are spaced evenly.
        assert (error <= torch.maximum(x.abs() * ROUNDING["fp8"], largest * 2.0**-17)).all()
    else:
        assert (error <= largest * ROUNDING["int8"]).all()
    assert error.max() > 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_largest_number_is_stored_near_the_end_of_the_range(kv_dtype: str) -> None:
    x = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    numbers = quantise(x, KV_DTYPES[kv_dtype])[0].float().amax(-1)
    end = page_formats.LARGEST[KV_DTYPES[kv_dtype]]
    assert numbers.min() >= (end / 2 if kv_dtype == "fp8" else end) and numbers.max() <= end


def test_e4m3_is_exact_in_bf16_and_quantised_once_more_it_is_the_same() -> None:
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 300)[:, None]
    once = read_back(x, "fp8")
    assert torch.equal(once, once.bfloat16().float())
    assert torch.equal(read_back(once, "fp8"), once)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_zeros_stay_and_what_is_not_finite_is_nan(kv_dtype: str) -> None:
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 0], x[3, 7] = math.nan, math.inf, -math.inf
    read = read_back(x, kv_dtype)
    assert torch.equal(read[0], torch.zeros(8))
    assert read[1:].isnan().all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_tokens_are_written_read_and_moved_with_their_scales(kv_dtype: str) -> None:
    pages = made(kv_dtype)
    k, v = (
        torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 100.0])[:, None, None, None]
    )
    slots = torch.tensor([0, 3, 4, 7, 10])
    page_formats.write_tokens(*pages, slots, k, v)
    for got, want in zip(page_formats.read_tokens(*pages, slots, torch.float32), (k, v), strict=True):
        assert torch.equal(got, read_back(want, kv_dtype))
    for all_of_them, want in zip(dequantised(*pages, torch.float32, 2), (k, v), strict=True):
        assert torch.equal(all_of_them.flatten(0, 1)[slots[:4]], read_back(want, kv_dtype)[:4])
        assert all_of_them[0, 1].isnan().all(), "a slot without a token"
    page_formats.move_tokens(*pages, slots[:2], torch.tensor([8, 1]))
    moved = page_formats.read_tokens(*pages, torch.tensor([8, 1]), torch.float32)
    assert torch.equal(moved[0], read_back(k, kv_dtype)[:2]) and torch.equal(moved[1], read_back(v, kv_dtype)[:2])


def test_a_page_is_one_run_of_bytes() -> None:
    k_pages, v_pages = made("fp8", page=16, groups=8, dim=128)
    assert raw_pages(k_pages).is_contiguous() and raw_pages(k_pages).shape == (3, page_bytes(16, 8, 128))
    assert page_bytes(16, 8, 128) / (2 * 16 * 8 * 128 * 2) < 0.51
    assert page_bytes(1, 1, 20) % 16 == 0
    copy = raw_pages(k_pages).clone()
    page_formats.write_tokens(k_pages, v_pages, torch.tensor([5]), torch.ones(1, 8, 128), torch.ones(1, 8, 128))
    changed = (raw_pages(k_pages) != copy).any(1)
    assert changed.tolist() == [True, False, False]


def test_pages_of_another_layout_are_refused() -> None:
    q = torch.zeros(1, 4, 16)
    k_pages, v_pages = made("int8")
    check_pages(q, k_pages, v_pages)
    with pytest.raises(ValueError, match="heads within tokens, with their scales behind them"):
        check_pages(q, *(torch.zeros(3, 4, 2, 16, dtype=torch.int8) for _ in range(2)))
    with pytest.raises(ValueError, match="v_pages that do not follow k_pages"):
        check_pages(q, k_pages, made("int8")[1])
    with pytest.raises(ValueError, match="must be of one dtype"):
        check_pages(q, k_pages, v_pages.view(torch.float8_e4m3fn))


def test_registered_operators_refuse_them() -> None:
    q, pages = torch.zeros(1, 4, 16), made("fp8")
    batch = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="float8_e4m3fn; these operators take pages in the dtype of q"):
        ops.paged_attention(q, *pages, *batch, 1.0)
    cos = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="float8_e4m3fn; these operators"):
        ops.rope_append(q, q[:, :2], q[:, :2], cos, cos, *pages, torch.zeros(1, dtype=torch.int64))
