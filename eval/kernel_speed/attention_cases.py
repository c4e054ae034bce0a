"""The shapes of the attention benchmark, their inputs, and the check that comes before every figure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, GROUPS, DIM = 32, 8, 128
# More K/V than any second-level cache holds: rotating over so much keeps it cold.
COLD_BYTES = 300e6
MAX_SETS = 40


@dataclass(frozen=True)
class Shape:
    """One line of the table: rows of `news` new tokens that end sequences of `lengths` tokens."""

    kind: str
    name: str
    lengths: tuple[int, ...]
    news: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in 16 bits."""
        return sum(self.lengths) * GROUPS * DIM * 2 * 2

    @property
    def operations(self) -> float:
        """Multiplications and additions of both products over the visible keys."""
        pairs = sum(new * (length - new) + new * (new + 1) / 2 for new, length in zip(self.news, self.lengths, strict=True))
        return 4.0 * pairs * HEADS * DIM

    @property
    def is_uniform(self) -> bool:
        """All rows are alike, so that one dense call computes the same."""
        return len(set(self.lengths)) == 1 and len(set(self.news)) == 1


def _rows(kind: str, count: int, length: int, new: int) -> Shape:
    size = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    name = f"{count} x {size}" if kind != "append" else f"{new} on {size}, B {count}"
    return Shape(kind, name, (length,) * count, (new,) * count)


def _skewed(count: int, mean: int) -> Shape:
    """Zipf's law: row i has a length in proportion to 1 / i."""
    weights = [1 / (row + 1) for row in range(count)]
    lengths = tuple(max(int(weight * mean * count / sum(weights)), 1) for weight in weights)
    return Shape("decode", f"skewed, B {count}, mean {mean // 1024}k", lengths, (1,) * count)


def _random(count: int, mean: int) -> Shape:
    drawn = torch.randint(1, 2 * mean, (count,), generator=torch.Generator().manual_seed(1))
    return Shape("decode", f"uniform random, B {count}, mean {mean // 1024}k", tuple(drawn.tolist()), (1,) * count)


def shapes(small: bool) -> list[Shape]:
    """The shapes of the table; `small` ones for a device that is slow."""
    if small:
        return [
            _rows("decode", 1, 1024, 1),
            _rows("decode", 8, 512, 1),
            _rows("append", 2, 512, 16),
            _rows("prefill", 1, 512, 512),
        ]
    found = [_rows("decode", b, 1024 * k, 1) for k in (1, 8, 32) for b in (1, 8, 16, 64, 256) if b * k <= 2048]
    found += [_skewed(64, 8192), _random(64, 8192)]
    found += [_rows("append", b, 8192, new) for new, b in ((4, 16), (16, 16), (64, 16), (128, 1), (128, 4), (128, 16))]
    found += [_rows("prefill", b, k * 1024, k * 1024) for b, k in ((16, 1), (4, 4), (1, 8), (1, 32))]
    return found


@dataclass
class Inputs:
    """`sets` copies of pages and queries of a shape, pages permuted, and the batch as the kernels take it."""

    shape: Shape
    q: list[Tensor]
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor

    @property
    def sets(self) -> int:
        return len(self.q)


def make_inputs(shape: Shape, page: int, device: torch.device, dtype: torch.dtype, heads_first: bool = False) -> Inputs:
    """Random queries, keys and values of `shape` in pages of `page` tokens; see `Inputs`."""
    sets = int(min(max(COLD_BYTES // shape.kv_bytes + 1, 1), MAX_SETS)) if device.type == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)
    columns = [-(-length // page) for length in shape.lengths]
    order = torch.randperm(sum(columns), generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(columns), max(columns)), -1, dtype=torch.int32)
    for row, part in enumerate(order.split(columns)):
        table[row, : len(part)] = part

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    def pages() -> Tensor:
        if heads_first:
            return normal(sum(columns), GROUPS, page, DIM).transpose(1, 2)
        return normal(sum(columns), page, GROUPS, DIM)

    begins = torch.tensor([0, *shape.news]).cumsum(0)
    return Inputs(
        shape,
        [normal(sum(shape.news), HEADS, DIM) for _ in range(sets)],
        [pages() for _ in range(sets)],
        [pages() for _ in range(sets)],
        table.to(device),
        begins.to(device, torch.int32),
        torch.tensor(shape.lengths, dtype=torch.int32, device=device),
    )


def dense_row(inputs: Inputs, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """q `[H, S, D]`, k and v `[G, L, D]` of one row of the first set."""
    shape, page = inputs.shape, inputs.k_pages[0].shape[1]
    length, first = shape.lengths[row], sum(shape.news[:row])
    pages = inputs.page_table[row, : -(-length // page)].long()
    q = inputs.q[0][first : first + shape.news[row]].transpose(0, 1)
    k, v = (held[0][pages].flatten(0, 1)[:length].transpose(0, 1) for held in (inputs.k_pages, inputs.v_pages))
    return q, k, v


def agrees(inputs: Inputs, out: Tensor) -> bool:
    """FlashAttention's criterion on the shortest and the longest row: at most twice PyTorch's error in the same dtype.

    At most 64 queries of a row are compared, the last ones.
    """
    shape = inputs.shape
    rows = {shape.lengths.index(min(shape.lengths)), shape.lengths.index(max(shape.lengths))}
    for row in rows:
        q, k, v = dense_row(inputs, row)
        queries = min(q.shape[1], 64)
        q = q[:, -queries:]
        end = sum(shape.news[: row + 1])
        ours = out[end - queries : end].transpose(0, 1)
        seen = torch.ones(queries, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - queries)
        plain = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]
        wide = torch.float64 if q.dtype == torch.float32 else torch.float32
        q, k, v = (x[None].to(wide) for x in (q, k, v))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0]
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        if (ours - exact).abs().max() > 2 * (plain - exact).abs().max() + floor:
            return False
    return True
