"""Graphs that sum over ranks go before the process group does: NCCL waits for them when it is destroyed."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch.distributed as dist


class Droppable(Protocol):
    """Holds recorded forwards."""

    def drop(self) -> None: ...


_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def dropped_before_end(holder: Droppable) -> None:
    """From now on `torch.distributed.destroy_process_group` has what `holder` recorded dropped first."""
    _holders.add(holder)
    destroy = dist.destroy_process_group
    if vars(destroy).get("drops_graphs"):
        return

    @functools.wraps(destroy)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        for one in list(_holders):
            one.drop()
        destroy(*args, **kwargs)

    destroy_process_group.drops_graphs = True  # type: ignore[attr-defined]
    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = destroy_process_group
