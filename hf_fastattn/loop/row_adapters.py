"""`RowAdapters`: which adapter each row of a call has, where PEFT was asked for several (`adapter_names=`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# PEFT's name for rows without an adapter.
BASE = "__base__"


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a batch.

    Attributes:
        names: of the adapters that some row has, each once, in alphabetical order.
        numbers: of each row's adapter, its place in `names`; -1 for rows without one.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]

    @staticmethod
    def of(rows: Sequence[str]) -> RowAdapters:
        """Those of PEFT's `adapter_names`."""
        names = tuple(sorted(set(rows) - {BASE}))
        return RowAdapters(names, tuple(names.index(name) if name != BASE else -1 for name in rows))
