"""`agreed_request`: whether all ranks that compute a model together run the device's loop, asked before the prompt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

ELSEWHERE = "another rank runs Transformers' own loop; its report has the reason"


def agreed_request(runtime: Any, request: Any, input_ids: Tensor, limits: Sequence[int] | None) -> Any:
    """`request`, or the reason that there is none, if that is so on every rank; a reason where only some ranks have one.

    What ranks recorded so far is compared too: where they differ, all forget it, so that they record the same forwards anew.

    Args:
        runtime: of a model that is spread over ranks.
        request: what the call asks for, or why no loop can serve it.
        input_ids: `[B, S]`.
        limits: new tokens a row, if they are set.

    Raises:
        ValueError: ranks were asked for different things.
    """
    able = not isinstance(request, str)
    stores = runtime.graphs, runtime.loop_graphs
    history = [number for store in stores for number in store.history]
    places = input_ids.flatten().cumsum(0).sum() if input_ids.numel() else 0
    asked = [_digest(request, limits) if able else 0, *input_ids.shape, int(places)]
    found = runtime.ranks.gathered([int(able), *history, *asked])
    if any(values[1 : 1 + len(history)] != history for values in found):
        for store in stores:
            store.forget()
    mine = found[0] if not able else [int(able), *history, *asked]
    others = [rank for rank, values in enumerate(found) if values[0] and values[1 + len(history) :] != mine[1 + len(history) :]]
    if able and others:
        raise ValueError(
            f"generate() was called on rank {others[0]} with another prompt or other options than on this one; processes that "
            "compute one model together need the same call on each (every rank's input_ids, seed and options alike)"
        )
    return request if not able or all(values[0] for values in found) else ELSEWHERE


def _digest(request: Any, limits: Sequence[int] | None) -> int:
    """A number for what a call asks for, the same in every process."""
    loop = getattr(request, "loop", request)
    search = {name: value for name, value in vars(request).items() if isinstance(value, bool | int | float | str)}
    held = (
        sorted(search.items()), loop.do_sample, loop.max_new, loop.ends, loop.suppressed, loop.pad, loop.choice.values(),
        loop.stop_strings is not None, [(type(one).__name__, one.sizes()) for one in loop.processors], limits,
    )  # fmt: skip
    return zlib.crc32(repr(held).encode())
