"""Inputs of the benchmark of 8-bit keys and values: the same numbers in 16 bits and quantised, and the check of results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fastattn.eval.kernel_speed.attention_cases import Inputs
from hf_fastattn.kernels.page_formats import KV_DTYPES, page_bytes, page_views, read_tokens, write_tokens

# Tokens that are quantised at a time.
PIECE = 65_536


def quantised(inputs: Inputs, kv_dtype: str) -> Inputs:
    """The same batch over pages of 8 bits with the same keys and values, rounded."""
    pairs = [_quantised(*pair, kv_dtype) for pair in zip(inputs.k_pages, inputs.v_pages, strict=True)]
    return replace(inputs, k_pages=[keys for keys, _ in pairs], v_pages=[values for _, values in pairs])


def _quantised(keys: Tensor, values: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    count, page, groups, dim = keys.shape
    raw = torch.zeros(count, page_bytes(page, groups, dim), dtype=torch.uint8, device=keys.device)
    k_pages, v_pages = page_views(raw, page, groups, dim, KV_DTYPES[kv_dtype])
    for begin in range(0, count * page, PIECE):
        slots = torch.arange(begin, min(begin + PIECE, count * page), device=keys.device)
        place = slots // page, slots % page
        write_tokens(k_pages, v_pages, slots, keys[place], values[place])
    return k_pages, v_pages


def agrees(inputs: Inputs, out: Tensor) -> bool:
    """FlashAttention's criterion on the first and last row, against exact attention over what is stored."""
    shape = inputs.shape
    for row in (0, len(shape.lengths) - 1):
        length, new, end = shape.lengths[row], shape.news[row], sum(shape.news[: row + 1])
        queries = min(new, 64)
        size = inputs.k_pages[0].shape[1]
        position = torch.arange(length, device=out.device)
        slots = inputs.page_table[row].long()[position // size] * size + position % size
        k, v = (x.transpose(0, 1)[None] for x in read_tokens(inputs.k_pages[0], inputs.v_pages[0], slots, torch.float32))
        q = inputs.q[0][end - queries : end].transpose(0, 1)[None]
        seen = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
        options: dict[str, Any] = {"attn_mask": seen, "enable_gqa": True}
        wide = torch.float64 if q.dtype == torch.float32 else torch.float32
        exact = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), **options)[0]
        plain = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), **options)[0]
        ours = out[end - queries : end].transpose(0, 1)
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        if not (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor:
            return False
    return True
