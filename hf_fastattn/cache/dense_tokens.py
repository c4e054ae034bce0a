"""Dense, left-padded views of paged rows, for code that wants `[B, G, L, D]`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.kernels.page_formats import read_tokens
from hf_fastattn.pages.page_table import PageTable


def dense_slots(
    table: PageTable, stored: Tensor | None, first: int, last: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which slot holds each column of each row.

    Args:
        table: the rows' pages.
        stored: `[B, last]` bool, the columns that hold a token; None if all do.
        first: first column wanted; `last` the one after the last.

    Returns:
        `[B, last - first]` slots `page * P + offset` (any valid slot where no token is stored), and the bool mask of
        those places, or None if there are none.
    """
    size = table.page_size
    slots = torch.zeros(len(table.rows), last - first, dtype=torch.int64, device="cpu")
    missing = None if stored is None else ~stored[:, first:last]
    within = torch.arange(size, device="cpu")
    for row, pages in enumerate(table.rows):
        of_tokens = (torch.tensor(pages, dtype=torch.int64, device="cpu")[:, None] * size + within).flatten()
        if stored is None:
            slots[row] = of_tokens[first:last]
        else:
            before = int(stored[row, :first].sum())
            here = stored[row, first:last]
            slots[row, here] = of_tokens[before : before + int(here.sum())]
    return slots.to(device), None if missing is None else missing.to(device)


def is_run(slots: Tensor) -> bool:
    """Whether `[.., n]` slots follow each other."""
    return slots.numel() > 0 and bool((slots[..., 1:] - slots[..., :-1] == 1).all())


def dense_eight_bits(
    held: tuple[Tensor, Tensor], slots: Tensor, missing: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `dense_tokens`, of K and V pages of 8 bits: both, in `dtype`."""
    if not len(held[0]):
        empty = torch.zeros(*slots.shape, *held[0].shape[2:], dtype=dtype, device=slots.device).transpose(1, 2)
        return empty, empty.clone()
    dense = []
    for tokens in read_tokens(*held, slots, dtype):
        shown = tokens if missing is None else tokens.masked_fill(missing[..., None, None], 0)
        dense.append(shown.transpose(1, 2))
    return dense[0], dense[1]


def dense_tokens(pages: Tensor, slots: Tensor, missing: Tensor | None) -> Tensor:
    """`[B, G, columns, D]` from pages `[N, P, G, D]`, zero at the places that `dense_slots` calls missing."""
    flat = pages.flatten(0, 1)
    if not len(flat):
        # No page was made yet: nothing is stored, and all slots are missing.
        tokens = flat.new_zeros(*slots.shape, *flat.shape[1:])
    elif slots.device.type == "cpu" and is_run(slots):
        # Adjacent pages are copied several times faster than they are gathered.
        tokens = torch.stack([flat[first : first + slots.shape[1]] for first in slots[:, 0].tolist()])
    else:
        tokens = flat[slots]
    if missing is not None:
        tokens = tokens.masked_fill(missing[..., None, None], 0)
    return tokens.transpose(1, 2)
