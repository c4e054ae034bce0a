"""A progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm.auto import tqdm  # type: ignore[import-untyped]

Item = TypeVar("Item")


def bar(items: Sequence[Item], name: str, unit: str, quiet: bool) -> Iterator[Item]:
    """`items`, with a bar on standard error unless `quiet`."""
    yield from tqdm(items, desc=name, unit=unit, disable=quiet)
