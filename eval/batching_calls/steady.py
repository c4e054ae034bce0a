"""What decoding reads at least, while nothing but decoding goes on, as a share of the time that it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_fastattn.eval.batching_calls.served import Served
from hf_fastattn.eval.generate_speed.limit import weight_bytes
from hf_fastattn.pages.model_layout import is_pageable, key_shape, layer_window, template_layers

# Until so many of the rows that were there at its beginning have ended.
REMAINING = 0.5


@dataclass(frozen=True)
class Steady:
    """From the last request's first token on, until half of the rows have ended.

    Attributes:
        seconds: how long.
        steps: in it.
        rows: of a step, on average.
        limit: seconds that reading weights, keys and values takes, where the speed of reading is known.
    """

    seconds: float
    steps: int
    rows: float
    limit: float | None

    @property
    def share(self) -> float | None:
        """Of the time in which the limit would have been reached."""
        return None if self.limit is None else self.limit / self.seconds


def steady(model: Any, served: Served, read: float | None) -> Steady | None:
    """The steady state of a served batch; None if there was none.

    Args:
        read: bytes a second that the device reads; None if it is not known.
    """
    held = {place: served.stamps(place) for place in served.outputs}
    held = {place: stamps for place, stamps in held.items() if stamps}
    if not held:
        return None
    start = max(stamps[0] for stamps in held.values())
    ends = {place: output.lifespan[1] for place, output in served.outputs.items() if output.lifespan[1] > start}
    if not ends:
        return None
    order = sorted(ends.values())
    stop = order[min(int(len(order) * (1 - REMAINING)), len(order) - 1)]
    # Whoever ends last has got a token in every step.
    clock = max(held.values(), key=lambda stamps: stamps[-1])
    steps = sum(start < stamp <= stop for stamp in clock)
    if steps < 2:
        return None
    tokens = 0
    totals: list[tuple[int, float]] = []
    for place, end in ends.items():
        ask = served.asks[place]
        count = sum(start < stamp <= min(stop, end) for stamp in clock)
        length = len(ask.prompt) + ask.new - sum(stop < stamp <= end for stamp in clock)
        tokens += count
        totals.append((count, length - (count + 1) / 2))
    limit = None
    if read is not None:
        limit = (steps * weight_bytes(model, tokens / steps) + sum(_key_value_bytes(model, *one) for one in totals)) / read
    return Steady(stop - start, steps, tokens / steps, limit)


def _key_value_bytes(model: Any, steps: int, length: float) -> float:
    """Bytes of keys and values that a row reads in so many steps, in which it holds `length` tokens on average."""
    groups, dim = key_shape(model.config)
    tokens = 0.0
    for layer in template_layers(model.config):
        if is_pageable(layer):
            window = layer_window(layer)
            tokens += length if window is None else min(length, window)
    return steps * tokens * 2 * groups * dim * float(model.dtype.itemsize)
