"""One evaluation in several processes: `accelerate launch -m hf_fastattn.eval.perplexity ...`, `torchrun`, or one alone.

The parts of an evaluation, its batches, are made before they are shared out, by every process alike. Each process measures
some of them; then all have all records, in the order of the parts, and sum over them in that order and in fp64. So the
figures are those of one process to the bit, where a part is computed alike wherever it runs: on the same kind of device,
and on a CPU by as many threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

# What a process waits for another: one of the parts that each measures between two exchanges.
PATIENCE = timedelta(hours=2)


Part = TypeVar("Part")


class Records(Protocol):
    """Where records are kept, as in a `Journal`."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Any: ...

    def add(self, key: str, record: Any) -> None: ...


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prints, and writes reports."""
        return self.rank == 0


# A part is under way, and what it evaluates is its own.
_measuring: ContextVar[bool] = ContextVar("measuring", default=False)


def processes() -> Processes:
    """The processes of this launch; their group is made when they are first asked for."""
    if _measuring.get() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size())


def own_device(device: str) -> str:
    """Of several GPUs the one of this process, where `device` names none of them."""
    if device != "cuda" or processes().count == 1:
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(torch.cuda.device_count(), 1)}"


def measured(
    parts: Sequence[Part], measure: Callable[[Part], Any], journal: Records, each: Callable[[], None] = lambda: None
) -> list[Any]:
    """The records of all parts in their order, the same in every process.

    What `measure` does in turn with evaluations, it does in its own process alone.

    Args:
        parts: the same in every process.
        measure: makes the record of a part, of what JSON can hold.
        journal: that of the first process holds records of earlier runs, by the part's number as text, and new ones.
        each: called for every part that is there.

    Raises:
        RuntimeError: `measure` failed in another process.
        Exception: what it raised in this one.
    """
    here, numbers = processes(), range(len(parts))
    known = _from_first(here, [str(number) in journal for number in numbers])
    missing = [number for number in numbers if not known[number]]
    for _ in range(len(parts) - len(missing)):
        each()
    for begin in range(0, len(missing), here.count):
        turn = missing[begin : begin + here.count]
        own = [parts[number] for number in turn[here.rank : here.rank + 1]]
        for number, record in zip(turn, _of_each(here, own, measure), strict=False):
            journal.add(str(number), record)
            each()
    # As a later run reads them back.
    found: list[Any] = _from_first(here, [journal[str(number)] for number in numbers] if here.is_first else [])
    return found


def _of_each(here: Processes, own: Sequence[Part], measure: Callable[[Part], Any]) -> list[Any]:
    """What each process measures of its part, if it has one."""
    failure: Exception | None = None
    record = None
    try:
        with _alone():
            record = measure(own[0]) if own else None
    except Exception as error:
        if here.count == 1:
            raise
        failure = error
    if here.count == 1:
        return [record]
    found: list[Any] = [None] * here.count
    dist.all_gather_object(found, (record, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    failed = next(((rank, why) for rank, (_, why) in enumerate(found) if why is not None), None)
    if failed is not None:
        raise RuntimeError(f"process {failed[0]} of the evaluation failed: {failed[1]}")
    return [record for record, _ in found]


def _from_first(here: Processes, value: Any) -> Any:
    """What the first process has."""
    if here.count == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


@contextmanager
def _alone() -> Iterator[None]:
    token = _measuring.set(True)
    try:
        yield
    finally:
        _measuring.reset(token)
