"""`DecodeReads`: what a step of one new token a row reads, computed once for all layers of a page group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

# Elements of keys, copies of the longest row's length, up to which rows of different lengths are copied to be read at once.
FEW_ELEMENTS = 2**17


@dataclass(frozen=True)
class Run:
    """Tokens `start .. start + length - 1` of one row, by their slots `page * P + offset`.

    `pages` are those from that of token `start` on; `first_slot` is set where the slots are adjacent.
    """

    start: int
    length: int
    first_slot: int | None
    pages: Sequence[int] = ()


@dataclass(frozen=True)
class SharedPrefix:
    """Rows `first_row .. last_row - 1`, whose first `run.length` tokens lie in the same pages."""

    first_row: int
    last_row: int
    run: Run


@dataclass
class DecodeReads:
    """The keys of all rows: shared prefixes, and what each row reads for itself.

    Attributes:
        shared: prefixes that are read once for all their rows.
        rows: the other tokens of each row.
        page_size: tokens a page.
        width: elements of a token's keys.
    """

    shared: list[SharedPrefix]
    rows: list[Run]
    page_size: int
    width: int
    _filled_up: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _pages: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def strided(self) -> tuple[int, int, int] | None:
        """`(first slot, slots from row to row, length)` if all rows are equally long runs at equal distances."""
        rows = self.rows
        if any(run.first_slot is None or run.length != rows[0].length for run in rows) or not rows[0].length:
            return None
        starts = [run.first_slot or 0 for run in rows]
        step = starts[1] - starts[0] if len(starts) > 1 else 0
        regular = step >= 0 and all(b - a == step for a, b in zip(starts, starts[1:], strict=False))
        return (starts[0], step, rows[0].length) if regular else None

    @cached_property
    def skipped(self) -> int | None:
        """Slots before the first token in the first page, if all rows are equally long and begin there; else None."""
        first = self.rows[0]
        same = first.length > 0 and all((run.start, run.length) == (first.start, first.length) for run in self.rows)
        return first.start % self.page_size if same else None

    def pages(self, device: torch.device) -> torch.Tensor:
        """`[B * columns]` int64 pages of rows of equal lengths, row after row."""
        if device not in self._pages:
            numbers = [page for run in self.rows for page in run.pages]
            self._pages[device] = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device)
        return self._pages[device]

    @cached_property
    def is_small(self) -> bool:
        """Whether there are several rows, each with a token, and copies of all, as long as the longest, are small."""
        lengths = [run.length for run in self.rows]
        return len(lengths) > 1 and min(lengths) > 0 and len(lengths) * max(lengths) * self.width <= FEW_ELEMENTS

    def filled_up(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of any lengths made as long as the longest, L, by repeating their last token.

        Returns:
            `[B * L]` int64 slots, row after row; `[B, 1, 1, L]` fp32 bias, -inf where a token is a repeated one.
        """
        if device not in self._filled_up:
            lengths = np.array([run.length for run in self.rows])[:, None]
            place = np.arange(lengths.max())
            slots = self._slots(np.minimum(place, lengths - 1))
            bias = np.where(place < lengths, np.float32(0), np.float32("-inf"))[:, None, None]
            self._filled_up[device] = tuple(torch.from_numpy(x).to(device) for x in (slots.reshape(-1), bias))  # type: ignore
        return self._filled_up[device]

    def _slots(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of tokens of the rows, `[B, L]`, counted from each row's first one."""
        firsts = [run.first_slot for run in self.rows]
        if None not in firsts:
            return np.array(firsts, np.int64)[:, None] + tokens
        held = tokens + np.array([run.start % self.page_size for run in self.rows])[:, None]
        pages = [np.array(run.pages)[row // self.page_size] for run, row in zip(self.rows, held, strict=True)]
        return np.stack(pages) * self.page_size + held % self.page_size
