"""`Runtime`: what lives with a patched model between calls: options, pages, graphs, counters, calls under way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hf_fastattn.cache import PagedCache
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counters import CallCounters
from hf_fastattn.loop_graphs import LoopGraphs
from hf_fastattn.page_groups import PageGroups, is_recurrent, template_layers
from hf_fastattn.prompt_rows import Expansion
from hf_fastattn.step_graphs import StepGraphs
from hf_fastattn.transformers_version import CACHE

logger = logging.getLogger("hf_fastattn")


@dataclass
class Call:
    """One `generate()` under way, and the caches made for it."""

    caches: list[PagedCache] = field(default_factory=list)
    expansion: Expansion | None = None
    prefilled: Any = None
    encoded_from: dict[str, Any] = field(default_factory=dict)

    def release(self, result: Any) -> list[PagedCache]:
        """Release the caches but the one that `result` returns to the caller."""
        kept = getattr(result, CACHE, None)
        for cache in self.caches:
            if cache is not kept:
                cache.reset()
        return [cache for cache in self.caches if cache is kept]


class Runtime:
    """State of one patched model.

    Args:
        config: the options.
        model_config: the model's configuration.
        dtype: the model's dtype, for the memory limit.
    """

    def __init__(self, config: FastAttnConfig, model_config: Any, dtype: Any) -> None:
        self.config = config
        self._dtype = dtype
        self.groups = PageGroups(model_config, config, dtype)
        recurrent = any(map(is_recurrent, template_layers(model_config)))
        reason = "a linear attention keeps a state" if recurrent else None
        self.graphs = StepGraphs(config.cuda_graphs, reason)
        self.loop_graphs = LoopGraphs(config.cuda_graphs, reason)
        self.counters = CallCounters()
        self.prefilling = False
        # A fast loop is under way: its static tensors are taken.
        self.looping = False
        # New tokens of each row of the next calls, at most; evaluations set it to know lengths beforehand.
        self.row_limits: list[int] | None = None
        self._calls: list[Call] = []
        self._lock = threading.RLock()
        self._logged: set[str] = set()

    @contextmanager
    def call(self, training: bool) -> Iterator[Any]:
        """A `generate()` call; yields a function that is told its result. Pages are released on the way out.

        Raises:
            RuntimeError: another thread is generating with this model.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this model is generating in another thread; use one model a thread (they may share weights), "
                "or wait for the other call"
            )
        result: list[Any] = [None]
        call = Call()
        try:
            if not self._calls:
                self.counters = CallCounters()
            self._calls.append(call)
            self.graphs.enter_call(True)
            yield lambda value: result.__setitem__(0, value)
        finally:
            returned = call.release(result[0])
            self._calls.remove(call)
            if self._calls:
                # An assistant's cache comes back to its caller, which is ours too.
                self._calls[-1].caches.extend(returned)
            else:
                version = self.groups.storage_version
                self.groups.shrink(0.0 if training else self.config.keep_memory)
                if self.groups.storage_version != version:
                    # Graphs read pages that are gone, and memory is wanted.
                    self.graphs.drop()
                    self.loop_graphs.drop()
            self.graphs.enter_call(bool(self._calls))
            self._lock.release()

    @property
    def expansion(self) -> Expansion | None:
        """How the innermost call repeated its inputs; None outside of a call."""
        return self._calls[-1].expansion if self._calls else None

    @expansion.setter
    def expansion(self, expansion: Expansion) -> None:
        if self._calls:
            self._calls[-1].expansion = expansion

    @property
    def in_call(self) -> bool:
        """Whether a `generate()` is under way."""
        return bool(self._calls)

    def is_private(self, cache: Any) -> bool:
        """Whether `cache` was made for the innermost call."""
        return bool(self._calls) and any(cache is own for own in self._calls[-1].caches)

    def keep_prefilled(self, outputs: Any) -> None:
        """The innermost call's prompt is computed; `take_prefilled` gives it to whoever would compute it again."""
        self._calls[-1].prefilled = outputs

    def take_prefilled(self) -> Any:
        """What `keep_prefilled` was given, once; else None."""
        if not self._calls:
            return None
        held, self._calls[-1].prefilled = self._calls[-1].prefilled, None
        return held

    def keep_encoded_from(self, inputs: dict[str, Any]) -> None:
        """The innermost call's towers have run over `inputs`; `take_encoded_from` gives them once."""
        if self._calls:
            self._calls[-1].encoded_from = inputs

    def take_encoded_from(self) -> dict[str, Any]:
        """What `keep_encoded_from` was given, once; else nothing."""
        if not self._calls:
            return {}
        held, self._calls[-1].encoded_from = self._calls[-1].encoded_from, {}
        return held

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Forwards inside compute the prompt."""
        before, self.prefilling = self.prefilling, True
        try:
            yield
        finally:
            self.prefilling = before

    def new_cache(self, model_config: Any, dtype: Any, room: int) -> PagedCache:
        """A cache for the call under way."""
        if dtype != self._dtype and not self.groups.pages_in_use:
            # The model was cast since: pages are counted in another size.
            self._dtype, self.groups = dtype, PageGroups(model_config, self.config, dtype)
        cache = PagedCache(model_config, groups=self.groups, counters=self.counters, room=room)
        self._calls[-1].caches.append(cache)
        return cache

    def count_forward(self, fallback: str | None, prompt_tokens: int) -> None:
        """Count a forward of the base decoder."""
        if fallback is not None:
            self.count_fallback(fallback)
            return
        self.counters.forwards += 1
        self.counters.prompt_tokens += prompt_tokens

    def note(self, reason: str) -> None:
        """Log once why a call is served in another way than it could be."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("hf_fastattn: %s", reason)

    def count_fallback(self, reason: str, level: int = logging.WARNING) -> None:
        """Count, and log once, that Transformers' own path runs."""
        self.counters.fallbacks[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.log(level, "hf_fastattn does here as Transformers does: %s", reason)
