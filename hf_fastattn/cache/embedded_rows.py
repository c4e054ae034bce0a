"""Which rows of a model's embeddings pages were computed with: of all others a change makes no page out of date."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class EmbeddedRows(NamedTuple):
    """Rows of embeddings as they are.

    Attributes:
        tokens: `[n]`, each once.
        sums: `[n]`, over the bits of each one's row; none is 0.
        vocabulary: how many rows there are.
    """

    tokens: NDArray[np.int64]
    sums: NDArray[np.int64]
    vocabulary: int


class KnownRows:
    """The sums of the rows that a state's pages were, or may have been, computed with."""

    def __init__(self) -> None:
        # By token, 0 of those that no page holds; memory that nobody has written to is not taken.
        self._sums = np.zeros(0, np.int64)

    def take(self, rows: EmbeddedRows | None) -> bool:
        """Whether none of these rows is another one than pages were computed with; if so, they are known from now on."""
        if rows is None:
            return True
        if len(self._sums) < rows.vocabulary:
            before, self._sums = self._sums, np.zeros(rows.vocabulary, np.int64)
            self._sums[: len(before)] = before
        known = self._sums[rows.tokens]
        if ((known != rows.sums) & (known != 0)).any():
            return False
        self._sums[rows.tokens] = rows.sums
        return True
