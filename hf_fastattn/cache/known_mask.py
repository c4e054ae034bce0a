"""`KnownMask`: which attention mask is known on the host, or to show what a cache stores, so that it need not be read."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from hf_fastattn.cache.tables_source import version_of


class KnownMask:
    """Remembers one mask `[B, columns]`: its first columns show exactly the tokens that are stored, all others are ones.

    `generate()` makes a new mask a step; to compare it with the cache, the host would have to wait for the device.
    """

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._version = 0
        self._compared = 0
        self._told: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def tell(self, mask: Tensor, shown: Tensor) -> None:
        """The values of `mask` `[B, columns]` are those of `shown`, bool on the host."""
        self._told = weakref.ref(mask), version_of(mask), shown

    def told(self, mask: Tensor) -> Tensor | None:
        """The values of `mask`, bool on the host, if they were told and it was not written to since."""
        if self._told is None or self._told[0]() is not mask or self._told[1] != version_of(mask):
            return None
        return self._told[2]

    def remember(self, mask: Any, columns: int) -> None:
        """Columns up to `columns` of `mask` were compared with the cache, or are known to agree with it."""
        # Of a longer mask only the columns so far were compared.
        usable = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == columns
        self._note(mask if usable else None, columns)

    def extend(self, before: Any, after: Any) -> None:
        """`after` is `before` with columns of ones behind it."""
        if self._is_the_one(before):
            self._note(after, self._compared)

    def select(self, before: Any, after: Any) -> None:
        """The rows of `before`, some of them several times, are those of `after`; the rows of the cache are as theirs."""
        self.extend(before, after)

    def knows(self, mask: Any, rows: int, past: int, new: int) -> bool:
        """Whether `mask` is known to show the `past` columns of a cache as stored, and the `new` ones after them."""
        return self._is_the_one(mask) and self._compared == past and mask.shape[0] == rows and mask.shape[1] >= past + new

    def _note(self, mask: Tensor | None, columns: int) -> None:
        self._mask = None if mask is None else weakref.ref(mask)
        self._version = 0 if mask is None else version_of(mask)
        self._compared = columns

    def _is_the_one(self, mask: Any) -> bool:
        if not isinstance(mask, Tensor) or self._mask is None:
            return False
        return self._mask() is mask and version_of(mask) == self._version
