"""`ShownStates`: copies of keys and values that somebody was shown, who may write into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Shown:
    """Keys and values of one layer.

    Args:
        states: `[B, G, L, D]` each, which nobody else has. What is given out are aliases, whose writes count as theirs.
    """

    def __init__(self, states: tuple[Tensor, Tensor]) -> None:
        self.states = states
        self._writes, self._owners = self._count_writes(), self._count_owners()

    def aliases(self) -> tuple[Tensor, Tensor]:
        """To give out."""
        keys, values = self.states
        return keys.detach(), values.detach()

    @property
    def is_written(self) -> bool:
        """Whether somebody has written into an alias, or a view of one."""
        return self._count_writes() != self._writes

    @property
    def is_held(self) -> bool:
        """Whether somebody has an alias, or a view of one; yes, where PyTorch does not count who shares a memory."""
        return self._owners is None or self._count_owners() != self._owners

    def _count_writes(self) -> list[int]:
        return [part._version for part in self.states]

    def _count_owners(self) -> list[int] | None:
        count = getattr(torch._C, "_storage_Use_Count", None)
        return None if count is None else [count(part.untyped_storage()._cdata) for part in self.states]


class ShownStates:
    """Keys and values of layers, read from pages, while the cache is in one state.

    In a layer of Transformers they would be what the cache holds: what is written into them counts. PyTorch counts the
    writes to a tensor and to its views; those past it, by way of `Tensor.data` and NumPy, nobody sees.
    """

    def __init__(self) -> None:
        self._shown: dict[int, Shown] = {}
        self._state: Any = None

    def __len__(self) -> int:
        return len(self._shown)

    def of(self, index: int, state: Any) -> tuple[Tensor, Tensor] | None:
        """What was shown of a layer in this state of the cache; None if nothing was, or nobody has it any more."""
        shown = self._shown.get(index) if self._state is state else None
        return None if shown is None else shown.aliases()

    def keep(self, index: int, state: Any, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Give out new `[B, G, L, D]` keys and values of a layer; what was shown in another state is let go."""
        self._let_go(state)
        self._state, self._shown[index] = state, Shown(states)
        return self._shown[index].aliases()

    def written(self, state: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """Layers with what was shown of them in this state, and written to since."""
        self._let_go(state)
        return {index: shown.states for index, shown in self._shown.items() if shown.is_written}

    def _let_go(self, state: Any) -> None:
        kept = self._shown if self._state is state else {}
        self._shown = {index: shown for index, shown in kept.items() if shown.is_held or shown.is_written}
        # A forward's batch is not kept for nothing.
        self._state = state if self._shown else None
