"""Inputs of paged attention with NaN wherever nothing may be read, the dense oracle, and the criterion of agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_fastattn.kernels.page_formats import KV_DTYPES, page_bytes, page_views, read_tokens, write_tokens


@dataclass(frozen=True)
class Batch:
    """Packed queries over pages, and the same keys and values row by row, as the oracle wants them."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: list[list[int]]
    counts: list[int]
    lengths: list[int]
    rows: list[tuple[Tensor, Tensor]]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def page_table(self) -> Tensor:
        """`[B, columns]` int32, -1 where a row holds no page; a view of a wider table."""
        width = max(map(len, self.table)) | 1
        wide = [row + [-1] * (width + 8 - len(row)) for row in self.table]
        return torch.tensor(wide, dtype=torch.int32, device=self.q.device)[:, :width]

    @property
    def cu_seqlens_q(self) -> Tensor:
        begins = torch.tensor([0, *self.counts]).cumsum(0)
        return begins.to(device=self.q.device, dtype=torch.int32)

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)


def make_batch(
    counts: Sequence[int],
    pasts: Sequence[int],
    *,
    page: int = 4,
    groups: int = 2,
    ratio: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    scattered: bool = False,
    shared: int = 0,
    window: int | None = None,
    factor: float = 1.0,
    q_layout: str = "contiguous",
    heads_first: bool = False,
    spare: int = 0,
    device: str = "cpu",
) -> Batch:
    """Random queries, keys and values; every slot that holds no token is NaN.

    Args:
        counts: new tokens of each row.
        pasts: tokens before those; -1 makes a row whose first query sees no key.
        scattered: pages in random order.
        shared: leading pages that all rows have in common.
        window: columns of the table before it are -1, as if released.
        factor: on the queries, for extreme scores.
        q_layout: "contiguous", "fused" (a slice of a projection of q, k and v) or "transposed" (heads before tokens).
        heads_first: pages lie in memory as `[N, G, P, D]`.
        spare: unused pages before all others.
    """
    generator = torch.Generator(device).manual_seed(sum(counts) * 1000 + sum(pasts))
    lengths = [past + count for past, count in zip(pasts, counts, strict=True)]
    columns = [-(-length // page) for length in lengths]
    total = spare + sum(columns) + 3
    order = torch.arange(spare, total)
    if scattered:
        order = order[torch.randperm(total - spare, generator=torch.Generator().manual_seed(total))]
    numbers = iter(order.tolist())
    prefix = [next(numbers) for _ in range(shared)]
    table = [prefix + [next(numbers) for _ in range(column - shared)] for column in columns]
    k_pages, v_pages = (_empty_pages(total, page, groups, dim, dtype, heads_first, device) for _ in range(2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    rows = []
    common = normal(2, shared * page, groups, dim)
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        pair = normal(2, max(length, 0), groups, dim)
        pair[:, : shared * page] = common
        released = 0 if window is None else max(past + 1 - window, 0) // page
        table[row][:released] = [-1] * released
        position = torch.arange(released * page, max(length, 0), device=device)
        page_of = torch.tensor(table[row] or [0], device=device)[position // page]
        for pages, own in zip((k_pages, v_pages), pair, strict=True):
            pages[page_of, position % page] = own[position]
        rows.append((pair[0], pair[1]))
    q = _lay_out(normal(sum(counts), groups * ratio, dim) * factor, q_layout)
    return Batch(q, k_pages, v_pages, table, list(counts), lengths, rows)


def in_eight_bits(batch: Batch, kv_dtype: str) -> Batch:
    """The same batch over pages of 8 bits; its rows are what these hold, in fp32. Bytes without a token are 255, NaN."""
    count, page, groups, dim = batch.k_pages.shape
    size = page_bytes(page, groups, dim)
    # One more page before the first, as in `make_batch`.
    raw = torch.full((count + 1, size), 255, dtype=torch.uint8, device=batch.q.device)[1:]
    k_pages, v_pages = page_views(raw, page, groups, dim, KV_DTYPES[kv_dtype])
    rows = []
    for pages, pair in zip(batch.table, batch.rows, strict=True):
        position = torch.arange(len(pair[0]), device=batch.q.device)
        held = torch.tensor(pages or [0], device=batch.q.device)[position // page]
        there = held >= 0
        slots = (held * page + position % page)[there]
        write_tokens(k_pages, v_pages, slots, *(own[there] for own in pair))
        stored = [own.float() for own in pair]
        for own, read in zip(stored, read_tokens(k_pages, v_pages, slots, torch.float32), strict=True):
            own[there] = read
        rows.append((stored[0], stored[1]))
    return replace(batch, k_pages=k_pages, v_pages=v_pages, rows=rows)


def _empty_pages(total: int, page: int, groups: int, dim: int, dtype: torch.dtype, heads_first: bool, device: str) -> Tensor:
    """Pages `[total, page, groups, dim]` of NaN, one more of them before the first: a read of page -1 shows as NaN."""
    inner = (groups, page) if heads_first else (page, groups)
    pages = torch.full((total + 1, *inner, dim), math.nan, dtype=dtype, device=device)[1:]
    return pages.transpose(1, 2) if heads_first else pages


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "fused":
        return torch.cat((x, x.new_full((len(x), 3, x.shape[-1]), math.nan)), 1)[:, :-3]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x


def dense_attention(
    batch: Batch, dtype: torch.dtype, *, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and LSE of plain attention, row by row, every step in `dtype`."""
    outs, lses = [], []
    q_rows = batch.q.to(dtype).split(batch.counts)
    for q, (keys, values), length in zip(q_rows, batch.rows, batch.lengths, strict=True):
        ratio = q.shape[1] // keys.shape[1]
        keys, values = (x.to(dtype).repeat_interleave(ratio, 1) for x in (keys, values))
        scores = torch.einsum("shd,lhd->hsl", q, keys) * batch.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - len(q), length, device=q.device)[:, None]
        key = torch.arange(len(keys), device=q.device)
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        scores = scores.masked_fill(hidden, -math.inf)
        # A query without a visible key has weights nan; its output is 0.
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        outs.append(torch.einsum("hsl,lhd->shd", weights, values))
        lses.append(scores.logsumexp(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _reversed(batch: Batch) -> Batch:
    """The same scores, as sums in the opposite order; values are as they were."""
    return replace(batch, q=batch.q.flip(-1), rows=[(keys.flip(-1), values) for keys, values in batch.rows])


def assert_close(name: str, ours: Tensor, plain: Tensor, want: Tensor) -> None:
    """`ours` errs at most twice as much as `plain`, PyTorch's result in the same dtype, both against fp64's `want`."""
    assert ours.shape == want.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    error, allowed = (ours.double() - want).abs().max(), 2 * (plain.double() - want).abs().max()
    if ours.dtype in (torch.float32, torch.float64):
        # Where PyTorch happens to be exact, the order of summation still may not matter.
        allowed += 4 * torch.finfo(ours.dtype).eps * want.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_attention(
    batch: Batch, got: tuple[Tensor, Tensor], *, window: int | None = None, softcap: float | None = None
) -> None:
    """Output under the criterion, LSE to what fp32 holds of the largest.

    In fp32 PyTorch's error is that of the worse of two orders of summation: one order alone may be lucky.
    """
    out, lse = got
    want, want_lse = dense_attention(batch, torch.float64, window=window, softcap=softcap)
    plain, _ = dense_attention(batch, batch.q.dtype, window=window, softcap=softcap)
    assert out.dtype == batch.q.dtype
    if plain.dtype == torch.float32 and want.numel():
        other, _ = dense_attention(_reversed(batch), plain.dtype, window=window, softcap=softcap)
        plain = torch.where((other - want).abs().max() > (plain - want).abs().max(), other, plain)
    assert_close("output", out, plain, want)
    largest = want_lse[want_lse.isfinite()].abs().max() if want_lse.isfinite().any() else 0.0
    torch.testing.assert_close(lse.double(), want_lse, atol=float(1e-4 + 1e-6 * largest), rtol=0)
