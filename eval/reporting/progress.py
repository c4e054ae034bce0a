"""A progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_fastattn.eval.accuracy.processes import processes

Item = TypeVar("Item")


@contextmanager
def counted(count: int, name: str, unit: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar for `count` things, and what to call for each; of several processes the first one's."""
    with tqdm(total=count, desc=name, unit=unit, disable=quiet or not processes().is_first) as shown:

        def each() -> None:
            shown.update(1)

        yield each


def bar(items: Sequence[Item], name: str, unit: str, quiet: bool) -> Iterator[Item]:
    """`items`, with a bar on standard error unless `quiet`."""
    yield from tqdm(items, desc=name, unit=unit, disable=quiet)
