"""`agreed_request`: whether all ranks that compute a model together run the device's loop, asked before the prompt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_fastattn.patches.fused.halves import halves_from

ELSEWHERE = "another rank runs Transformers' own loop: its report has the reason"


def agreed_request(model: Any, request: Any, input_ids: Tensor) -> Any:
    """`request`, or the reason that there is none, if that is so on every rank; a reason where only some ranks have one.

    What ranks recorded so far, and their pages, are compared too: where they differ, all let go of them, so that they record
    the same forwards anew.

    Args:
        model: patched, and spread over ranks.
        request: what the call asks for, or why no loop can serve it.
        input_ids: `[B, S]`.

    Raises:
        ValueError: ranks were patched with other options, or asked for different things.
    """
    runtime = model._fastattn.runtime
    able = not isinstance(request, str)
    pages = (group.storage.capacity for group in runtime.groups)
    history = [*runtime.graphs.history, *runtime.loop_graphs.history, *pages, int(runtime.graphs.prompts_rest)]
    asked = [_digest(request, runtime.row_limits), *input_ids.shape, _sum_of(input_ids)] if able else [0] * 4
    # Where a rank has a hook, it calls modules, whose sums would not meet those of halves.
    halves = halves_from(model._fastattn.decoder(model), input_ids.numel()) if able else 0
    mine = [int(able), halves, zlib.crc32(repr(runtime.config).encode()), *history, *asked]
    found = runtime.ranks.gathered(mine)
    other = _other(found, mine, slice(2, 3))
    if other is not None:
        raise ValueError(
            f"the model was patched with other options on rank {other} than on this one; give patch() the same on every rank"
        )
    if _other(found, mine, slice(3, -4)) is not None:
        # Where pages are made anew, the next forward is not recorded.
        runtime.graphs.forget()
        runtime.loop_graphs.forget()
        runtime.groups.shrink(0.0)
        runtime.graphs.prompts_rest = True
    if not able or not all(values[0] for values in found):
        return request if not able else ELSEWHERE
    other = _other(found, mine, slice(-4, None))
    if other is not None:
        raise ValueError(
            f"generate() was called with another prompt or other options on rank {other} than on this one; processes that "
            "compute one model together need the same call on each: give every rank the same input_ids and options"
        )
    if runtime.current is not None:
        wanted = [values[1] for values in found]
        runtime.current.halves_from = max(wanted) if all(wanted) else 0
    if runtime.config.backend != "reference":
        runtime.ranks.set_up_peers(model)
    return request


def _other(found: Sequence[Sequence[int]], mine: Sequence[int], part: slice) -> int | None:
    """The first rank whose values differ there from this one's."""
    return next((rank for rank, values in enumerate(found) if list(values[part]) != list(mine[part])), None)


def _sum_of(input_ids: Tensor) -> int:
    """A number that depends on the tokens and their places."""
    return int(input_ids.flatten().cumsum(0).sum())


def _digest(request: Any, limits: Sequence[int] | None) -> int:
    """A number for what a call asks for, the same in every process."""
    loop = getattr(request, "loop", request)
    plain = sorted((name, value) for name, value in vars(request).items() if isinstance(value, bool | int | float | str))
    held = (
        plain, loop.do_sample, loop.max_new, loop.ends, loop.suppressed, loop.pad, loop.choice.values(),
        loop.stop_strings is not None, [(type(one).__name__, one.sizes()) for one in loop.processors], limits,
        None if loop.forced is None else zlib.crc32(loop.forced.tokens.numpy().tobytes()),
    )  # fmt: skip
    return zlib.crc32(repr(held).encode())
