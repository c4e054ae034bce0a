"""`StockParts`: what evaluations find of stock alone, kept for later runs that plant another fault in the same texts.

Stock, and the exact model, take more than half of the time of a small run, and no fault reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar

from torch import Tensor

Part = TypeVar("Part")

# Bytes of tensors from which on nothing more is kept.
MOST_BYTES = 2**30


class StockParts:
    """Parts by what they depend on: an evaluation with its settings, and a batch."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._bytes = 0

    def of(self, key: Hashable, measure: Callable[[], Part]) -> Part:
        """The part with this key, measured if it is not here yet; whoever gets it must leave it as it is."""
        if key in self._kept:
            part: Part = self._kept[key]
            return part
        part = measure()
        size = sum(tensor.nbytes for tensor in _tensors(part))
        if self._bytes + size <= MOST_BYTES:
            self._kept[key], self._bytes = part, self._bytes + size
        return part


def _tensors(part: Any) -> Iterator[Tensor]:
    """Those in a part, its tuples and its dataclasses; lists and dictionaries hold figures."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple) or is_dataclass(part):
        for item in part if isinstance(part, tuple) else vars(part).values():
            yield from _tensors(item)
