"""Pages of 8-bit keys and values, in plain PyTorch: their layout, and how numbers are quantised and read.

A token's key of one head is stored as `values * scale`, with `values [D]` of e4m3 (Micikevicius et al., 2022, "FP8 formats
for deep learning") or int8 and a scale of its own in bf16; its value likewise. A page is one run of bytes: keys `[P, G, D]`,
values `[P, G, D]`, then for each head and token a word of both scales, `[G, P, 2]`. So whoever copies pages copies scales
with them, appending never quantises again what is stored, and the scales of a head's neighbouring tokens are read at once.

Scales of e4m3 are powers of two: what is read back is exact in bf16, and quantising it once more changes nothing. A key or
value with an element that is not finite gets the scale NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By the name in `FastAttnConfig.kv_dtype`.
KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# The largest numbers that are stored.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Pages begin where 16 bytes can be read at once.
ALIGNMENT = 16


def is_eight_bits(pages: Tensor) -> bool:
    """Whether pages hold 8-bit numbers."""
    return pages.dtype in LARGEST


def page_bytes(page: int, groups: int, dim: int) -> int:
    """Bytes of a page of P = `page` tokens, `groups` heads and `dim` dimensions: keys, values and scales."""
    used = 2 * page * groups * dim + 4 * page * groups
    return -(-used // ALIGNMENT) * ALIGNMENT


def page_views(raw: Tensor, page: int, groups: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The K and V pages `[N, P, G, D]` in `raw: [N, page_bytes]` uint8; as them scales are passed on too."""
    shape, strides = (raw.shape[0], page, groups, dim), (raw.shape[1], groups * dim, dim, 1)
    numbers = raw.view(dtype)
    first = raw.storage_offset()
    return numbers.as_strided(shape, strides, first), numbers.as_strided(shape, strides, first + page * groups * dim)


def raw_pages(k_pages: Tensor) -> Tensor:
    """The bytes `[N, page_bytes]` that the K pages of `page_views` are a part of."""
    size = k_pages.stride(0)
    return k_pages.view(torch.uint8).as_strided((k_pages.shape[0], size), (size, 1), k_pages.storage_offset())


def page_scales(k_pages: Tensor) -> Tensor:
    """The scales `[N, G, P, 2]`, bf16, written in place: of keys, and of values."""
    count, page, groups, dim = k_pages.shape
    begin = 2 * page * groups * dim
    words = raw_pages(k_pages)[:, begin : begin + 4 * page * groups].view(torch.bfloat16)
    return words.view(count, groups, page, 2)


def why_not_pages(k_pages: Tensor, v_pages: Tensor) -> str | None:
    """Why tensors of 8 bits are no pages of `page_views`; None if they are."""
    _, page, groups, dim = k_pages.shape
    if k_pages.stride() != (page_bytes(page, groups, dim), groups * dim, dim, 1):
        return f"strides {k_pages.stride()}, but pages of 8 bits are heads within tokens, with their scales behind them"
    if v_pages.data_ptr() != k_pages.data_ptr() + page * groups * dim:
        return "v_pages that do not follow k_pages in each page; make both by page_formats.page_views"
    return None


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x: [..., D]` as numbers `[..., D]` of `dtype`, and their scales `[...]`, bf16."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    if dtype == torch.int8:
        scales = (largest * (1.0 / 127.0)).to(torch.bfloat16).float().clamp_min(2.0**-126)
        numbers = (wide * (1.0 / scales)[..., None]).round().clamp(-127, 127)
        # What is not finite has no integer.
        numbers = torch.nan_to_num(numbers, nan=0.0)
    else:
        # The power of two by which the largest element is at most 448 = 1.75 * 2^8.
        exponent = (largest.view(torch.int32) + 0x1FFFFF) >> 23
        scales = ((exponent - 8).clamp_min(1) << 23).view(torch.float32)
        numbers = (wide / scales[..., None]).clamp(-448, 448)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return numbers.to(dtype), scales.to(torch.bfloat16)


def write_tokens(k_pages: Tensor, v_pages: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Quantise `k: [T, G, D]` and `v` into their `slots: [T]`, `page * P + offset`."""
    size = k_pages.shape[1]
    place = slots // size, slots % size
    scales = page_scales(k_pages)
    for which, (pages, new) in enumerate(((k_pages, k), (v_pages, v))):
        numbers, factors = quantise(new, pages.dtype)
        pages.view(torch.uint8).index_put_(place, numbers.view(torch.uint8))
        scales[:, :, :, which].transpose(1, 2).index_put_(place, factors)


def read_tokens(k_pages: Tensor, v_pages: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values `[..., G, D]` in `dtype` of the tokens in `slots: [...]`."""
    size = k_pages.shape[1]
    place = slots // size, slots % size
    scales = page_scales(k_pages).transpose(1, 2)[place].float()
    keys, values = (
        (pages.view(torch.uint8)[place].view(pages.dtype).float() * scales[..., which, None]).to(dtype)
        for which, pages in enumerate((k_pages, v_pages))
    )
    return keys, values


def move_tokens(k_pages: Tensor, v_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy the tokens in slots `sources: [T]` to slots `targets: [T]`, as they are stored."""
    size = k_pages.shape[1]
    scales = page_scales(k_pages).transpose(1, 2)
    for held in (k_pages.view(torch.uint8), v_pages.view(torch.uint8), scales):
        held.index_put_((targets // size, targets % size), held[sources // size, sources % size])


def dequantised(k_pages: Tensor, v_pages: Tensor, dtype: torch.dtype, pages: int) -> tuple[Tensor, Tensor]:
    """The first so many K and V pages `[pages, P, G, D]` in `dtype`; slots without a token are NaN, or any number."""
    scales = page_scales(k_pages)[:pages].transpose(1, 2).float()
    keys, values = (
        (held[:pages].float() * scales[..., which, None]).to(dtype) for which, held in enumerate((k_pages, v_pages))
    )
    return keys, values
