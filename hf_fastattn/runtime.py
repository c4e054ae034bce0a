"""`Runtime`: what lives with a patched model between calls: options, pages, graphs, counters, calls under way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicCache

from hf_fastattn.cache import PagedCache
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.conversion import why_not_lent
from hf_fastattn.counters import CallCounters
from hf_fastattn.lent_cache import LentCache
from hf_fastattn.loop_graphs import LoopGraphs
from hf_fastattn.page_groups import PageGroups, is_recurrent, keys_dtype, template_layers
from hf_fastattn.prompt_rows import Expansion
from hf_fastattn.step_graphs import StepGraphs
from hf_fastattn.transformers_version import CACHE

logger = logging.getLogger("hf_fastattn")


@dataclass
class Call:
    """One `generate()` under way, and the caches made for it."""

    caches: list[PagedCache] = field(default_factory=list)
    lent: list[LentCache] = field(default_factory=list)
    expansion: Expansion | None = None
    prefilled: Any = None
    encoded_from: dict[str, Any] = field(default_factory=dict)

    def release(self, result: Any) -> list[PagedCache]:
        """Release the caches but the one that `result` returns to the caller; give back those that users lent."""
        for lent in self.lent:
            lent.give_back()
            if getattr(result, CACHE, None) is lent.paged:
                result[CACHE] = lent.dynamic
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
        # What keys were counted for: pages of another dtype or place belong to caches of another time.
        self._made_for: tuple[Any, Any] = (dtype, None)
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
            version = self.groups.storage_version
            returned = call.release(result[0])
            self._calls.remove(call)
            if self._calls:
                # An assistant's cache comes back to its caller, which is ours too.
                self._calls[-1].caches.extend(returned)
            else:
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
        if not self._calls or any(cache is lent.paged for lent in self._calls[-1].lent):
            return False
        return any(cache is own for own in self._calls[-1].caches)

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

    def groups_for(self, model: Any) -> PageGroups:
        """The pages of the model as it is now; those from before it was cast or moved go with the caches that hold them."""
        wanted = (keys_dtype(model), model.device)
        if self._made_for[1] is None and self._made_for[0] == wanted[0]:
            self._made_for = wanted
        if self._made_for != wanted:
            self.groups = PageGroups(model.config, self.config, wanted[0])
            self._made_for = wanted
        return self.groups

    def new_cache(self, model: Any, room: int, lender: DynamicCache | None = None) -> PagedCache:
        """A cache for the call under way.

        Args:
            model: whose keys it will hold.
            room: tokens that a row is expected to reach.
            lender: a user's cache that it stands in for until the end of the call.
        """
        config = model.config.get_text_config(decoder=True)
        cache = PagedCache(config, groups=self.groups_for(model), counters=self.counters, room=room)
        if lender is not None:
            self._calls[-1].lent.append(LentCache(lender, cache))
        self._calls[-1].caches.append(cache)
        return cache

    def paged_of(self, cache: Any) -> Any:
        """The paged cache that stands in for `cache` in the innermost call; `cache` itself if there is none."""
        lent = self._calls[-1].lent if self._calls else []
        return next((one.paged for one in lent if one.dynamic is cache), cache)

    def take_in(self, decoder: Any, cache: Any) -> Any:
        """`paged_of`, also for a filled `DynamicCache` that somebody puts in the place of the call's own: PEFT's prefix."""
        paged = self.paged_of(cache)
        if paged is not cache or type(cache) is not DynamicCache or not self._calls or not self._calls[-1].caches:
            return paged
        if not cache.get_seq_length():
            return cache
        reason = why_not_lent(cache, decoder.config)
        if reason is not None:
            self.count_fallback(reason)
            return cache
        return self.new_cache(decoder, self._calls[-1].caches[0].room, cache)

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
