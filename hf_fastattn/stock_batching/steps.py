"""What the layers of one forward of Transformers' continuous batching read and write, made by the first and used by all.

Requests are packed into one row `[1, T]`. `cu_seqlens` say whose tokens are where, a block table or indices of tokens say
which pages hold what came before. All is computed on the device, without a host sync, so that Transformers may record the
forward as a CUDA graph; only the reference backend, on a CPU, looks at values.

Sliding layers keep a request's last W tokens in a ring of W slots: token p lies in slot `p % W`. The order of keys does
not matter to attention, and once a new token is written its ring holds what it sees and nothing else. So a decode step
reads the ring as it reads other pages, without a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_fastattn.kernels.attention.read_plan import ReadPlan

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.work_list import WorkLists

# Tokens a page where gathered keys, which lie one behind the other, are read as pages; see `token_pages`.
GATHERED_PAGE = 16


@dataclass
class PagedStep:
    """The new tokens of a forward, for all layers that share pages.

    Attributes:
        page_table: `[B, columns]` int32; entries past a row's keys may be anything.
        seq_lens: `[B]` int32, keys of each row with its new tokens; 0 for rows that are padding.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin; None if every row has one.
        max_query_len: the most new tokens of a row.
        page_size: tokens a page.
        slots: `[T]` int64, where new tokens are written, `page * P + offset`; None if that has been done.
        window: keys a query sees, itself included; None if all that the table names.
    """

    page_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    max_query_len: int
    page_size: int
    slots: Tensor | None
    window: int | None = None
    work_lists: WorkLists = field(default_factory=dict)

    @cached_property
    def plan(self) -> ReadPlan:
        """The same for the reference backend, from the tensors' values."""
        lengths, size = self.seq_lens.tolist(), self.page_size
        counts = [1] * len(lengths) if self.cu_seqlens_q is None else self.cu_seqlens_q.diff().tolist()
        rows = self.page_table.tolist()
        if self.slots is None:
            # One page a token: a row's keys lie one behind the other.
            size, rows = 1, [range(row[0], row[0] + length) for row, length in zip(rows, lengths, strict=True)]
        pages = [list(row[: -(-length // size)]) for row, length in zip(rows, lengths, strict=True)]
        return ReadPlan(pages, counts, lengths, size, self.window)


def decode_step(block_table: Tensor, cu_seqlens_k: Tensor, page_size: int, trash: int, is_ring: bool) -> PagedStep:
    """One new token a row, whose pages a block table names.

    Args:
        block_table: `[B, columns]` int32 pages; -1 where there is none. Of a ring, the last column is the new token's slot
            as `fill_ring` writes it.
        cu_seqlens_k: `[B + 1]` int32, keys of each row with its new token.
        trash: a slot that nobody reads, for rows that are padding.
        is_ring: whether a new token overwrites the one that left the window.
    """
    lengths = cu_seqlens_k.diff().to(torch.int32)
    if is_ring:
        slots = block_table[:, -1].long()
        slots = torch.where(slots >= 0, slots, trash)
    else:
        last = (lengths - 1).clamp(min=0).long()
        page = block_table.gather(1, (last // page_size)[:, None]).squeeze(1).long()
        slots = torch.where(lengths > 0, page * page_size + last % page_size, trash)
    return PagedStep(block_table, lengths, None, 1, page_size, slots)


def fill_ring(row: Tensor, pages: list[int], past: int, window: int, page_size: int) -> None:
    """Fill a ring's row of the block table on the host, with the slot of the new token in its last column.

    Args:
        row: `[columns]` int32, at least one column more than pages.
        pages: those of the ring, the first holding slots 0 to P - 1.
        past: tokens before the new one.
    """
    page, offset = divmod(past % window, page_size)
    row[: len(pages)] = torch.tensor(pages, dtype=row.dtype)
    row[-1] = pages[page] * page_size + offset


def prompt_step(
    read_index: Tensor,
    write_index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths: tuple[int, int],
    page_size: int,
) -> PagedStep:
    """Several new tokens a row, over the pages that hold them and those before; a page's first token tells its number.

    Args:
        read_index: `[keys]` int64 slots of all keys, row after row, new ones included; empty if there are none but new ones.
        write_index: `[T]` int64 slots of the new tokens.
        lengths: the most queries and the most keys of a row.
    """
    max_queries, max_keys = lengths
    index = read_index if read_index.numel() else write_index
    # 32 bits: where Transformers warms up, a row may have as many columns as the whole cache has pages.
    columns = torch.arange(0, max(max_keys, 1), page_size, device=index.device, dtype=torch.int32)
    first = (cu_seqlens_k[:-1, None] + columns).clamp(max=index.shape[0] - 1)
    table = (index // page_size).to(torch.int32)[first]
    return PagedStep(
        table, cu_seqlens_k.diff().to(torch.int32), _or_none(cu_seqlens_q, write_index, max_queries), max_queries, page_size,
        write_index,
    )  # fmt: skip


def gathered_step(
    tokens: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, lengths: tuple[int, int], window: int
) -> PagedStep:
    """New tokens of rows with a window, over keys that lie one behind the other, row after row.

    Args:
        tokens: keys of all rows, padding included.
        lengths: the most queries and the most keys of a row.
        window: keys a query sees, itself included.
    """
    max_queries, max_keys = lengths
    size = gathered_page_size(tokens)
    columns = torch.arange(0, max(max_keys, 1), size, device=cu_seqlens_k.device, dtype=torch.int32)
    table = cu_seqlens_k[:-1, None] + columns
    return PagedStep(table, cu_seqlens_k.diff().to(torch.int32), cu_seqlens_q, max_queries, size, None, window)


def gathered_page_size(tokens: int) -> int:
    """Tokens a page of `token_pages`: a view may not reach past its storage, as one of fewer tokens than a page would."""
    return GATHERED_PAGE if tokens >= GATHERED_PAGE else 1


def token_pages(x: Tensor, size: int) -> Tensor:
    """`[L, G, D]` as pages `[1, P, G, D]`, each beginning one token after the last; all L have numbers."""
    return x.as_strided((1, size, *x.shape[1:]), (x.stride(0), *x.stride()), x.storage_offset())


def _or_none(cu_seqlens_q: Tensor, write_index: Tensor, max_queries: int) -> Tensor | None:
    """None where every row has one query."""
    return None if max_queries == 1 and write_index.shape[0] == cu_seqlens_q.shape[0] - 1 else cu_seqlens_q
