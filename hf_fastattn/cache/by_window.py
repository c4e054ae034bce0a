"""`ByWindow`: one value for each attention window of a model, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByWindow(Mapping[int | None, Value], Generic[Value]):
    """A mapping from windows to what `make` returns for each, kept.

    Args:
        windows: the keys.
        make: called with a window, once.
    """

    def __init__(self, windows: Iterable[int | None], make: Callable[[int | None], Value]) -> None:
        self._windows = tuple(windows)
        self._make = make
        self._made: dict[int | None, Value] = {}

    def __getitem__(self, window: int | None) -> Value:
        if window not in self._made:
            if window not in self._windows:
                raise KeyError(window)
            self._made[window] = self._make(window)
        return self._made[window]

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._windows)

    def __len__(self) -> int:
        return len(self._windows)
