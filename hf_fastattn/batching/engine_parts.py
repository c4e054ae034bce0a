"""`EngineParts`: what an `Engine` is made of for a patched model: pages, static tensors, graphs, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import RequestState

from hf_fastattn.batching.choice import Choice, why_not_model
from hf_fastattn.batching.engine import MOST_TOKENS, Engine
from hf_fastattn.batching.host_steps import HostSteps
from hf_fastattn.batching.requests import Request
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.cache.embedded_rows import EmbeddedRows
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_store import PrefixStore
from hf_fastattn.counters import CallCounters
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.runtime import Runtime

# Most requests that take part in a step.
MOST_SLOTS = 512
# Rows that steps are recorded for before anybody knows how many there will be.
LIKELY_ROWS = 16
# Bytes of pages that are made at once where nobody says how many there will be, or may be.
EXPECTED = 2 * 2**30
WARM_PROMPT, WARM_TOKENS = 64, 3


class EngineParts:
    """For one manager; engines are made one after the other.

    Args:
        model: patched.
        choice: how tokens are chosen.
        config: Transformers' of the manager, resolved.
    """

    def __init__(self, model: Any, choice: Choice, config: Any) -> None:
        self._model, self._choice, self._config = model, choice, config
        self._runtime: Runtime = model._fastattn.runtime
        self._graphs: LoopGraphs | None = None
        self._cache: PagedCache | None = None
        self._pages: SlotPages | None = None
        self._own_store: PrefixStore | None = None
        self._epoch = 0

    @property
    def slots(self) -> int:
        """Requests in the running batch, at most."""
        asked = getattr(self._config, "max_requests_per_batch", None) or MOST_SLOTS
        return min(asked, MOST_SLOTS)

    def engine(self, deliver: Callable[[list[Request]], None], hints: Any = None) -> Engine:
        """A new engine, with nothing in it."""
        runtime, model = self._runtime, self._model
        runtime.settle()
        runtime.counters = CallCounters()
        self.check()
        config = model.config.get_text_config(decoder=True)
        cache = PagedCache(config, groups=runtime.groups_for(model), counters=runtime.counters)
        self._graphs, self._cache = runtime.take_batch_graphs(), cache
        pages = SlotPages(cache, self.slots, self._most_tokens(cache), *self._store(cache))
        self._pages = pages
        asked = getattr(self._config, "max_batch_tokens", None) or MOST_TOKENS
        columns = -(-_longest(hints) // pages.page_size)
        pages.expect(self._expected(pages, hints, columns))
        return Engine(
            model, pages, self.slots, lambda vocabulary: self._steps(columns, vocabulary), deliver, self._choice,
            min(asked, MOST_TOKENS), self._waits(_requests(hints)),
        )  # fmt: skip

    def _expected(self, pages: SlotPages, hints: Any, columns: int) -> int:
        """Pages to make at once: those made later move all others, and steps are recorded anew."""
        by_default = EXPECTED // max(pages.cache.groups.page_bytes, 1)
        most = by_default if pages.most is None else pages.most // 2
        if columns:
            return min(self.slots * columns, hints.num_requests * columns, most)
        return min(by_default, most) if self._model.device.type == "cuda" else 0

    @property
    def _mixes(self) -> bool:
        """Whether steps are to take in pieces of prompts."""
        return self._runtime.config.mixed_steps

    def _waits(self, requests: int) -> bool:
        """Whether the requests of a group wait for the one that may get most tokens, as all of them run beside prompts."""
        if not requests or not self._mixes or self._why_not_recorded() is not None:
            return False
        # Not before: it imports Triton.
        from hf_fastattn.batching.mixed_steps import most_rows

        return requests <= most_rows()

    def _steps(self, columns: int, vocabulary: int) -> Any:
        assert self._graphs is not None and self._pages is not None
        device, reason = self._model.device, self._why_not_recorded()
        if reason is not None:
            if device.type != "cpu":
                self._runtime.counters.uncaptured[reason] += 1
            return HostSteps(self._model, self._pages, self.slots, self._choice, device)
        # Not before: it imports Triton.
        from hf_fastattn.batching.device_steps import DeviceSteps
        from hf_fastattn.batching.mixed_steps import MixedSteps

        kind = MixedSteps if self._mixes else DeviceSteps
        return kind(self._model, self._graphs, self._pages, self.slots, columns, vocabulary, self._choice, device)

    def _why_not_recorded(self) -> str | None:
        assert self._graphs is not None and self._cache is not None
        return self._graphs.why_not_here(self._model, self._cache) or self._graphs.why_not(self._model, self._cache)

    def _most_tokens(self, cache: PagedCache) -> int | None:
        """Tokens that pages may hold, as the manager's options say, or the device's free memory."""
        blocks, device = getattr(self._config, "num_blocks", None), self._model.device
        if blocks is not None:
            # Older releases call it by the other name.
            size = getattr(self._config, "page_size", None) or self._config.block_size
            return int(blocks * size)
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        share = getattr(self._config, "max_memory_percent", None) or 0.8
        memory = int((free + idle) * share) + cache.groups.nbytes
        return memory // max(cache.groups.page_bytes, 1) * cache.groups.page_size

    def _store(self, cache: PagedCache) -> tuple[PrefixStore | None, int]:
        """What finds pages that prompts begin with, and the root of those of the model as it is."""
        if set(cache.tables) != {None} or not getattr(self._config, "allow_block_sharing", True):
            return None, 0
        if self._keeps_prefixes:
            # Pages that stay are generate()'s too.
            store = self._runtime.prefix_store(cache.groups)
            return store, store.root_of(*self._state_now())
        self._own_store = PrefixStore(cache.groups)
        return self._own_store, self._own_store.root_of(*self._state_now())

    @property
    def _keeps_prefixes(self) -> bool:
        return self._runtime.config.prefix_cache and not self._model.training

    def _state_now(self) -> tuple[Any, EmbeddedRows | None]:
        """What pages depend on but for their tokens, and the rows of embeddings, of any of which there may be prompts."""
        decoder, states = self._model._fastattn.decoder(self._model), self._runtime.model_state
        towers = self._model.config.get_text_config(decoder=True) is not self._model.config
        if self._keeps_prefixes and not towers and states.why_not(decoder) is None:
            return states.of(decoder, decoder.device)
        return (id(self), self._epoch), None

    # ---- while it runs ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if the model was changed so that the batch cannot go on; graphs of a changed model are forgotten."""
        reason = self._why_changed()
        if reason is not None:
            raise RuntimeError(
                f"the model was changed while requests were under way: {reason}; stop the manager before, and start another"
            )
        if self._keeps_prefixes:
            self._name_state()

    def enter(self, works: bool) -> None:
        """From now on the model is as `check` has found it, or nobody has looked."""
        self._runtime.graphs.enter_call((lambda: self) if works else None)

    def cause_of(self, error: Exception) -> Exception:
        """What an error of a running batch comes from."""
        reason = self._why_changed()
        return error if reason is None else RuntimeError(f"the model was changed while requests were under way: {reason}")

    def _why_changed(self) -> str | None:
        state = getattr(self._model, "_fastattn", None)
        if getattr(state, "runtime", None) is not self._runtime:
            return "it is not patched any more"
        reason = why_not_model(self._model)
        if reason is not None or self._cache is None:
            return reason
        if self._runtime.groups_for(self._model) is not self._cache.groups:
            return "its keys have another dtype, window or device"
        # Graphs of what is not as it was are forgotten.
        self._why_not_recorded()
        return None

    def renew(self) -> None:
        """The weights may be others: prompts to come find none of the pages so far."""
        self._epoch += 1
        self._name_state()

    def _name_state(self) -> None:
        if self._pages is not None and self._pages.store is not None:
            self._pages.root = self._pages.store.root_of(*self._state_now())

    def warm_up(self, hints: Any) -> None:
        """Serve a request to nobody, so that kernels are compiled and steps recorded; on a CPU there is neither."""
        engine = self.engine(lambda requests: None, hints)
        rows = min(self.slots, _requests(hints) or LIKELY_ROWS)
        try:
            if self._why_not_recorded() is not None or self._is_warm(rows):
                return
            tokens = [0] * min(WARM_PROMPT, _longest(hints) or WARM_PROMPT)
            engine.add(RequestState("warm-up", tokens, max_new_tokens=WARM_TOKENS))
            while not engine.is_idle:
                engine.run()
            # Whoever does not know how many requests come has prompts that come while rows decode.
            engine.record(rows, mixed=self._mixes and not _requests(hints))
        finally:
            self.release(engine)

    def _is_warm(self, rows: int) -> bool:
        """Whether the step of so many rows is recorded."""
        # Not before: it imports Triton.
        from hf_fastattn.loop.device_state import bucket_of

        assert self._graphs is not None and self._cache is not None
        key = self._choice.graph_key(bucket_of(rows))
        return self._graphs.has(key, self._cache.groups.storage_version)

    def release(self, engine: Engine) -> None:
        """Give back what the engine held."""
        engine.close()
        cache, store, graphs = self._cache, self._own_store, self._graphs
        self._cache = self._pages = self._own_store = self._graphs = None
        if store is not None:
            store.close()
        if cache is not None:
            cache.reset()
        if store is None and self._runtime.prefixes is not None:
            self._runtime.prefixes.trim()
        if graphs is not None:
            self._runtime.give_batch_graphs(graphs)


def _requests(hints: Any) -> int:
    """Requests that somebody expects; 0 if nobody does."""
    return int(getattr(hints, "num_requests", 0) or 0)


def _longest(hints: Any) -> int:
    """Tokens that a request has at most, as somebody expects; 0 if nobody does."""
    if hints is None or not hints.max_prompt_length:
        return 0
    return int(hints.max_prompt_length + (hints.max_generated_length or 0))
