"""`ShownStates`: copies of keys and values that somebody was shown, who may write into them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


class Shown:
    """Keys and values of one layer.

    Args:
        states: `[B, G, L, D]` each, which nobody else has yet.
    """

    def __init__(self, states: tuple[Tensor, Tensor]) -> None:
        self.states = states
        self._writes, self._holders = self._count_writes(), self._count_holders()

    @property
    def is_written(self) -> bool:
        """Whether somebody has written into them, or into a view, or wants their gradients."""
        return self._count_writes() != self._writes or any(part.requires_grad for part in self.states)

    @property
    def is_held(self) -> bool:
        """Whether somebody has them, or a view; yes, where PyTorch does not count who shares a memory."""
        return self._holders is None or self._count_holders() != self._holders

    def _count_writes(self) -> list[int]:
        return [part._version for part in self.states]

    def _count_holders(self) -> list[tuple[int, int]] | None:
        count = getattr(torch._C, "_storage_Use_Count", None)
        if count is None:
            return None
        return [(sys.getrefcount(part), count(part.untyped_storage()._cdata)) for part in self.states]


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
        return None if shown is None else shown.states

    def keep(self, index: int, state: Any, states: tuple[Tensor, Tensor]) -> None:
        """Keys and values of a layer, new tensors, are shown to somebody; what was shown in another state is let go."""
        self._let_go(state)
        self._state, self._shown[index] = state, Shown(states)

    def now(self, state: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, what was shown in this state, and somebody has still or has written to."""
        self._let_go(state)
        return {index: shown.states for index, shown in self._shown.items()}

    def is_written(self, state: Any) -> bool:
        """Whether somebody has written to what was shown in this state."""
        self._let_go(state)
        return any(shown.is_written for shown in self._shown.values())

    def take_written(self, index: int, state: Any) -> tuple[Tensor, Tensor] | None:
        """What was shown of a layer in this state, if somebody has written to it; it is nobody's from then on."""
        shown = self._shown.get(index) if self._state is state else None
        if shown is None or not shown.is_written:
            return None
        del self._shown[index]
        return shown.states

    def carried(self, state: Any, after: Any) -> ShownStates:
        """The same, of what was shown in `state`, for the state that comes after it."""
        self._let_go(state)
        other = ShownStates()
        other._shown, other._state = self._shown, after
        return other

    def _let_go(self, state: Any) -> None:
        kept = self._shown if self._state is state else {}
        self._shown = {index: shown for index, shown in kept.items() if shown.is_held or shown.is_written}
        # A forward's batch is not kept for nothing.
        self._state = state if self._shown else None
