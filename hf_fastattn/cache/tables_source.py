"""`TablesSource`: the tables of RoPE that something was made from once for all layers, to know them by in the next layer.

A layer whose hooks give it others, or write to these, has what it was given; so have, of those that were written to, the
layers behind it.
"""

from __future__ import annotations

import operator

from torch import Tensor


class TablesSource:
    """Tables as they are now; kept alive, so that no other tensor can be taken for one of them."""

    def __init__(self, *tables: Tensor) -> None:
        self._tables, self._versions = tables, tuple(map(version_of, tables))

    def is_still(self, *tables: Tensor) -> bool:
        """Whether these are the same tensors, not written to since."""
        same = len(tables) == len(self._tables) and all(map(operator.is_, tables, self._tables))
        return same and tuple(map(version_of, tables)) == self._versions


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to; inference tensors, which `generate()` makes inside that mode, do not tell."""
    return 0 if tensor.is_inference() else tensor._version
