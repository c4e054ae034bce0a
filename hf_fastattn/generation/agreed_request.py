"""`agreed_request`: whether all ranks that compute a model together run the device's loop, asked before the prompt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_fastattn.patches.fused.halves import halves_from

ELSEWHERE = "another rank runs Transformers' own loop: its report has the reason"


def agreed_request(model: Any, request: Any, input_ids: Tensor, private: bool, keeps: bool) -> Any:
    """`request`, or the reason that there is none, if that is so on every rank; a reason where only some ranks have one.

    Args:
        model: patched, and spread over ranks, which have agreed on the call (`agreed_call.py`).
        request: what the call asks for, or why no loop can serve it.
        input_ids: `[B, S]`.
        private: nobody sees the cache after the call, so that rows may leave it; if that is so on all ranks.
        keeps: what was generated may stay for prompts to come; likewise.

    Raises:
        ValueError: ranks were asked for different things.
    """
    runtime = model._fastattn.runtime
    able, call = not isinstance(request, str), runtime.current
    # Where a rank has a hook, it calls modules, whose sums would not meet those of halves.
    halves = halves_from(model._fastattn.decoder(model), input_ids.numel()) if able else 0
    mine = [int(able), halves, int(private), int(keeps), _digest(request, runtime.row_limits) if able else 0]
    found = runtime.ranks.gathered(mine)
    if not able or not all(values[0] for values in found):
        return request if not able else ELSEWHERE
    other = next((rank for rank, values in enumerate(found) if values[-1] != mine[-1]), None)
    if other is not None:
        raise ValueError(
            f"generate() was called with another prompt or other options on rank {other} than on this one; processes that "
            "compute one model together need the same call on each: give every rank the same input_ids and options"
        )
    if call is not None:
        wanted = [values[1] for values in found]
        call.halves_from = max(wanted) if all(wanted) else 0
        call.is_private, call.keeps_rows = (all(values[place] for values in found) for place in (2, 3))
    if runtime.config.backend != "reference":
        runtime.ranks.set_up_peers(model)
    return request


def _digest(request: Any, limits: Sequence[int] | None) -> int:
    """A number for what a call asks for, the same in every process."""
    loop = getattr(request, "loop", request)
    plain = sorted((name, value) for name, value in vars(request).items() if isinstance(value, bool | int | float | str))
    held = (
        plain, loop.do_sample, loop.max_new, loop.ends, loop.suppressed, loop.pad, loop.choice.values(),
        getattr(loop.stop_strings, "stop_strings", None),
        [(type(one).__name__, one.sizes()) for one in loop.processors], limits,
        None if loop.forced is None else zlib.crc32(loop.forced.tokens.numpy().tobytes()),
    )  # fmt: skip
    return zlib.crc32(repr(held).encode())
