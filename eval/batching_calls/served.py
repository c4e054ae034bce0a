"""Requests served by a manager of continuous batching, stock's or ours, with the times of what came back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from hf_fastattn.eval.batching_calls.cases import Ask

# Rows whose every token's time is noted where all requests are there at once: the rest tell as much.
WATCHED_LONGEST, WATCHED_LAST = 6, 2
# Seconds that the main thread waits for a result at a time, and for nothing to come before it gives up.
TICK, PATIENCE = 0.25, 120


@dataclass
class Served:
    """What came of requests.

    Attributes:
        asks: the requests.
        seconds: of all, with the start and the end of the manager, unless requests arrive one by one.
        serving: of all, from the first request to the last token.
        outputs: Transformers' `GenerationOutput` by place; fewer than requests where time was limited.
        tokens: that have come.
        remaining: that have not, where time was limited.
        fastest: tokens a second of the quickest quarter of the time, where time was limited.
    """

    asks: Sequence[Ask]
    seconds: float = 0.0
    serving: float = 0.0
    outputs: dict[int, Any] = field(default_factory=dict)
    tokens: int = 0
    remaining: int = 0
    fastest: float = 0.0

    @property
    def whole_seconds(self) -> float:
        """Of all requests; at least, where time was limited: those that are left at the quickest pace, without prompts."""
        return self.seconds + (self.remaining / self.fastest if self.remaining else 0.0)

    def stamps(self, place: int) -> list[float]:
        """When each token of a request came, if anybody looked."""
        return list(self.outputs[place].timestamps or []) if place in self.outputs else []

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens of all requests that were looked at."""
        found: list[float] = []
        for place in self.outputs:
            stamps = self.stamps(place)
            found += [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
        return found

    @property
    def waits(self) -> list[float]:
        """Seconds from the arrival of a request to its first token, of those that were looked at."""
        held = {place: self.stamps(place) for place in self.outputs}
        return [stamps[0] - self.outputs[place].created_time for place, stamps in held.items() if stamps]


def watched(asks: Sequence[Ask]) -> set[int]:
    """Places of those that get most tokens, and of the last ones."""
    longest = sorted(range(len(asks)), key=lambda place: -asks[place].new)
    return {*longest[:WATCHED_LONGEST], *range(len(asks) - WATCHED_LAST, len(asks))} & set(range(len(asks)))


def serve(
    model: Any, asks: Sequence[Ask], looks: set[int] | None = None, most_seconds: float | None = None, batching: Any = None
) -> Served:  # fmt: skip
    """Serve requests, greedily, none of which ends before its last token.

    They are added one by one, as `generate_batch` does, whose requests have one limit for all.

    Args:
        looks: places whose tokens' times are noted; all by default.
        most_seconds: stop then. Requests are streamed, so that their tokens are counted.
        batching: Transformers' `ContinuousBatchingConfig`, if not the default one.

    Raises:
        RuntimeError: a request failed, or nothing comes any more.
    """
    config = GenerationConfig(max_new_tokens=max(ask.new for ask in asks), do_sample=False, pad_token_id=0, eos_token_id=-1)
    at_once = not any(ask.arrival or ask.after for ask in asks)
    hints = WorkloadHints(max(len(ask.prompt) for ask in asks), max(ask.new for ask in asks), len(asks)) if at_once else None
    start = begin = time.perf_counter()
    given = {"generation_config": config, "continuous_batching_config": batching, "workload_hints": hints, "timeout": 5}
    with model.continuous_batching_context_manager(**given) as manager:
        begin = time.perf_counter()
        collector = _Collector(manager, asks, set(range(len(asks))) if looks is None else looks, most_seconds)
        served = collector.run(begin)
    started = begin - start if at_once else 0.0
    served.seconds = started + served.serving
    if at_once and not served.remaining:
        served.seconds = time.perf_counter() - start
    return served


class _Collector:
    """Adds requests when they arrive, and takes what comes back."""

    def __init__(self, manager: Any, asks: Sequence[Ask], looks: set[int], most_seconds: float | None) -> None:
        self._manager, self._asks, self._looks, self._most = manager, asks, looks, most_seconds
        self._served = Served(asks)
        self._counts: Counter[int] = Counter()
        self._times: list[float] = []
        # The next one to arrive comes last.
        order = [place for place, ask in enumerate(asks) if ask.after is None]
        self._coming = sorted(order, key=lambda place: -asks[place].arrival)
        self._triggers = {ask.after: place for place, ask in enumerate(asks) if ask.after is not None}

    def run(self, start: float) -> Served:
        held, last = self._served, time.perf_counter()
        while len(held.outputs) < len(self._asks):
            now = time.perf_counter() - start
            while self._coming and self._asks[self._coming[-1]].arrival <= now:
                self._add(self._coming.pop())
            if self._most is not None and now > self._most:
                self._cut(start)
                break
            wait = self._asks[self._coming[-1]].arrival - now if self._coming else TICK
            result = self._manager.get_result(timeout=max(min(wait, TICK), 1e-4))
            if result is not None:
                last = time.perf_counter()
                self._take(result, last - start)
            elif time.perf_counter() - last > PATIENCE or not self._manager.is_running():
                raise RuntimeError(f"nothing comes any more; {len(held.outputs)} of {len(self._asks)} requests are done")
        held.serving = time.perf_counter() - start
        held.tokens = sum(self._counts.values())
        return held

    def _add(self, place: int) -> None:
        ask = self._asks[place]
        streams = self._most is not None or any(first == place for first, _ in self._triggers)
        self._manager.add_request(
            ask.prompt, request_id=str(place), max_new_tokens=ask.new, streaming=streams,
            record_timestamps=place in self._looks,
        )  # fmt: skip

    def _take(self, result: Any, now: float) -> None:
        place, count = int(result.request_id), len(result.generated_tokens)
        if result.error is not None:
            raise RuntimeError(f"request {place} failed: {result.error}")
        self._times += [now] * (count - self._counts[place])
        self._counts[place] = count
        for trigger in [found for found in self._triggers if found[0] == place and found[1] <= count]:
            self._add(self._triggers.pop(trigger))
        if result.is_finished():
            self._served.outputs[place] = result

    def _cut(self, start: float) -> None:
        """Time is up: what is left is not waited for."""
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        held, now = self._served, time.perf_counter() - start
        held.remaining = sum(ask.new for ask in self._asks) - sum(self._counts.values())
        quarter = now / 4
        most = max(sum(part * quarter < one <= (part + 1) * quarter for one in self._times) for part in range(4))
        held.fastest = max(most, 1) / quarter
