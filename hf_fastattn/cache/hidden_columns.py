"""`Hidden`: tokens of one layer that a mask hides, kept aside while pages leave them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """Tokens of one layer that a mask hides, which pages leave out and the owner of the cache still has a right to.

    Attributes:
        where: `[B, columns]` bool on the host, the hidden ones among the first columns.
        keys: `[n, G, D]`, row after row; `values` likewise.
    """

    where: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def of(where: Tensor, first: int, keys: Tensor, values: Tensor) -> Hidden:
        """The tokens `where` of `[B, G, held, D]` keys and values whose first column is `first`."""
        held = where[:, first:].to(keys.device)
        where = where.clone()
        where[:, :first] = False
        return Hidden(where, *(states.transpose(1, 2)[:, : held.shape[1]][held] for states in (keys, values)))

    def crop(self, columns: int) -> Hidden:
        """Without what lies behind the first `columns` of the cache."""
        return self._only(self.where & (torch.arange(self.where.shape[1], device="cpu") < columns), columns)

    def _only(self, where: Tensor, columns: int) -> Hidden:
        kept = where[self.where].to(self.keys.device)
        return Hidden(where[:, :columns], self.keys[kept], self.values[kept])

    def select(self, rows: list[int]) -> Hidden:
        """Row b becomes what row `rows[b]` was."""
        counts = self.where.sum(1).tolist()
        parts = [(states.split(counts), states[:0]) for states in (self.keys, self.values)]
        keys, values = (torch.cat([none, *(by_row[row] for row in rows)]) for by_row, none in parts)
        return Hidden(self.where[rows], keys, values)

    def put_back(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Write the hidden tokens into `[B, G, held, D]` keys and values whose first column is `first`."""
        last = min(first + keys.shape[2], self.where.shape[1])
        inside = torch.zeros_like(self.where)
        inside[:, first:last] = self.where[:, first:last]
        held = self._only(inside, self.where.shape[1])
        place = inside[:, first:last].to(keys.device)
        for target, source in ((keys, held.keys), (values, held.values)):
            target.transpose(1, 2)[:, : place.shape[1]][place] = source
