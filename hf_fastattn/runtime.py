"""`Runtime`: what lives with a patched model between calls: options, pages, graphs, counters, calls under way."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from hf_fastattn.cache.conversion import why_not_lent
from hf_fastattn.cache.lent_cache import LentCache
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_store import PrefixStore
from hf_fastattn.call import Call
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counted_reasons import CountedReasons
from hf_fastattn.counters import CallCounters
from hf_fastattn.expansion import Expansion
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.graphs.model_state import ModelState
from hf_fastattn.graphs.rotary_copies import RotaryCopies
from hf_fastattn.layer_variants import LayerVariants
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.pages.model_layout import keys_dtype, template_layers
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.spans import Spans
from hf_fastattn.pages.turn import Turn
from hf_fastattn.parallel.ranks import Ranks

# Seconds that a call waits for one in another thread before Transformers' own path serves it.
PATIENCE = 0.05
# Bytes that a model in train mode keeps in any case: making tensors and graphs anew would cost each rollout milliseconds.
KEPT_IN_TRAINING = 128 * 2**20
BUSY = "the model is busy in another thread"


def _windows(config: Any) -> tuple[Any, ...]:
    """What a configuration says of its layers' windows."""
    text = config.get_text_config(decoder=True)
    # Not how many layers there are: an early exit uses fewer of them for its drafts.
    return getattr(text, "sliding_window", None), tuple(getattr(text, "layer_types", None) or ())


class Runtime(CountedReasons):
    """State of one patched model.

    Calls of one thread may be nested; one of another thread waits for a moment and then runs as if the model were not
    patched. Everything about a call ends with it, however it ends: what it had no time to clean up, the next one does.

    Args:
        config: the options.
        model_config: the model's configuration.
        dtype: the model's dtype, for the memory limit.
        why_not_experts: why a decoder's mixtures of experts cannot be recorded, if there is a reason.
        variants: of attention, by layer.
        ranks: processes that compute the model together, if it is spread over several.
    """

    def __init__(
        self,
        config: FastAttnConfig,
        model_config: Any,
        dtype: Any,
        why_not_experts: Callable[..., str | None] | None = None,
        variants: LayerVariants | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.ranks = config, ranks
        # Key heads are spread evenly, or the model is not understood.
        self._key_ranks = 1 if ranks is None else ranks.count
        self._alike = None if ranks is None else lambda holds: ranks.alike([int(holds)])
        super().__init__(LayerVariants() if variants is None else variants)
        # Dtype, windows and device that the pages were made for; a changed model gets new pages, old caches keep theirs.
        self._made_for: tuple[Any, ...] = (dtype, _windows(model_config), None)
        # The thread with the turn owns the calls under way, the pages, the graphs and their static tensors.
        self.turn = Turn()
        # Calls that run as if the model were not patched.
        self._aside = Spans()
        self.groups = PageGroups(model_config, config, dtype, self.turn, self._key_ranks, self._alike)
        stocks_draws = config.sampling == "transformers"
        recording = (stocks_draws, why_not_experts, self.variants)
        self.graphs = ForwardGraphs(config.cuda_graphs, *recording)
        self.loop_graphs = LoopGraphs(config.cuda_graphs, *recording)
        self.graphs.ranks = self.loop_graphs.ranks = ranks
        # Those of running batches, which generate() may be called beside; None while a manager has them.
        self._batch_graphs: LoopGraphs | None = None
        self._new_batch_graphs = functools.partial(LoopGraphs, config.cuda_graphs, *recording)
        # New tokens of each row of the next calls, at most; evaluations set it to know lengths beforehand.
        self.row_limits: list[int] | None = None
        # Whether rows of a call share pages; evaluations set it to see what that saves.
        self.shares_rows = True
        # Sizes of forwards whose kernels were compiled ahead.
        self.rehearsed: set[Any] = set()
        # Rotary embeddings on the devices of layers that are not where the model's own is.
        self.rotary_copies = RotaryCopies()
        # Operations for the expert blocks of a paged forward under way whose layers are called.
        self.block_products: Any = None
        # Pages that stay for prompts to come, and how the state of the model is named that they belong to.
        self.prefixes: PrefixStore | None = None
        self.model_state = ModelState(config.weights == "check", config.backend != "reference")
        self._calls: list[Call] = []

    # ---- calls ------------------------------------------------------------------------------------------------

    def call(self, training: bool, generate: Callable[[], Any], why_aside: str | None = None) -> Any:
        """What `generate()` returns, run as a call under way; pages are released however it ends.

        Args:
            training: the model is in train mode, where no memory is kept.
            why_aside: a reason for which it may run as if the model were not patched.

        Raises:
            RankFailedError: another process that computes the model failed.
        """
        if self.ranks is not None:
            generate = functools.partial(self.ranks.watched, functools.partial(self._compared, self.ranks, generate))
        if self.is_aside:
            return generate()
        if why_aside is not None and self.ranks is None and not self.variants:
            if not self._calls:
                self.counters = CallCounters()
            self.count_fallback(why_aside)
            return (self._aside.open(), generate())[1]
        return (self.turn.take(PATIENCE), self._call(training, generate))[1]

    def _compared(self, ranks: Ranks, generate: Callable[[], Any]) -> Any:
        """What a call over ranks returns, once they have seen that all return the same; the device's loop sees to it."""
        result = generate()
        call = self.current
        if call is not None and not call.looped and len(self._calls) == 1:
            tokens = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
            ranks.compare_results(0 if tokens is None else zlib.crc32(tokens.cpu().contiguous().numpy().tobytes()))
        return result

    def _call(self, training: bool, generate: Callable[[], Any]) -> Any:
        if not self.turn.is_mine():
            self.count_fallback(BUSY)
            return (self._aside.open(), generate())[1]
        call = Call()
        return (call.begin(), self._run(call, training, generate))[1]

    def _run(self, call: Call, training: bool, generate: Callable[[], Any]) -> Any:
        result = None
        try:
            self._drop_ended_calls()
            if not self._calls:
                self.counters = CallCounters()
            self._calls.append(call)
            self.graphs.enter_call(call.token)
            result = generate()
            return result
        finally:
            self._end(call, result, training)

    def _end(self, call: Call, result: Any, training: bool) -> None:
        version = self.groups.storage_version
        self.model_state.forget()
        returned = call.release(result)
        self._calls = [other for other in self._calls if other is not call]
        if self._calls:
            # An assistant's cache comes back to its caller, which is ours too.
            self._calls[-1].caches.extend(returned)
            self.graphs.enter_call(self._calls[-1].token)
            return
        self.graphs.enter_call(None)
        if self.ranks is not None and self.ranks.failure is not None:
            # They sum over ranks that are gone.
            self.graphs.drop()
            self.loop_graphs.drop()
        self._end_prefixes(training)
        keeps_all = not training or self.config.keep_in_training
        kept = keeps_all or self._keep_small()
        self.graphs.prompts_rest &= not keeps_all
        self.groups.shrink(self.config.keep_memory if kept else 0.0)
        if self.groups.storage_version != version:
            # Graphs read pages that are gone, and memory is wanted.
            self.graphs.drop()
            self.loop_graphs.drop()
            self._batch_graphs = None

    def take_batch_graphs(self) -> LoopGraphs:
        """The graphs of running batches, for one manager."""
        held, self._batch_graphs = self._batch_graphs, None
        return held or self._new_batch_graphs()

    def give_batch_graphs(self, graphs: LoopGraphs) -> None:
        """A manager needs them no more, nor pages: what is not to be kept goes."""
        version = self.groups.storage_version
        self.groups.settle()
        if not self._calls:
            self.groups.shrink(self.config.keep_memory)
        self._batch_graphs = graphs if self.groups.storage_version == version else None

    def prefix_store(self, groups: PageGroups) -> PrefixStore:
        """The pages that stay for prompts to come, of the call's groups."""
        if self.prefixes is None or self.prefixes.groups is not groups:
            self.close_prefixes()
            self.prefixes = PrefixStore(groups, True, self.config.memory_limit is not None)
        return self.prefixes

    def close_prefixes(self) -> None:
        """Let go of the pages that stay for prompts to come."""
        if self.prefixes is not None:
            self.prefixes.close()
            self.prefixes = None

    def _end_prefixes(self, training: bool) -> None:
        if self.prefixes is None:
            return
        if training:
            # Weights are about to change, and memory is wanted.
            self.close_prefixes()
            return
        self.prefixes.trim()
        self.counters.prefix_pages_evicted += self.prefixes.index.evicted
        self.prefixes.index.evicted = 0

    def release_memory(self) -> bool:
        """Give back all that no cache holds: pages, those that stay for prompts to come, graphs; False if it is in use."""
        return (self.turn.take(PATIENCE), self._release_memory())[1]

    def _release_memory(self) -> bool:
        if not self._settle() or self._calls:
            return False
        self.close_prefixes()
        self.graphs.drop()
        self.loop_graphs.drop()
        self._batch_graphs = None
        self.model_state.drop()
        self.groups.shrink(0.0)
        self.groups.workspaces.clear()
        return True

    @property
    def history(self) -> list[int]:
        """Numbers that are the same on two ranks that recorded the same forwards and hold the same pages."""
        pages = (group.storage.capacity for group in self.groups)
        prefixes = (0, 0) if self.prefixes is None else (len(self.prefixes.index), self.prefixes.named)
        return [*self.graphs.history, *self.loop_graphs.history, *pages, int(self.graphs.prompts_rest), *prefixes]

    def forget_recorded(self) -> None:
        """Begin anew, as other ranks do: without recorded forwards, and without pages that nobody holds."""
        self.close_prefixes()
        self.graphs.forget()
        self.loop_graphs.forget()
        self.groups.shrink(0.0)
        # Where pages are made anew, the next forward is not recorded.
        self.graphs.prompts_rest = True

    def _keep_small(self) -> bool:
        """Whether pages and graphs are small; graphs of prompts are dropped if the others are without them."""
        held = self.groups.nbytes + self.loop_graphs.nbytes
        held += 0 if self._batch_graphs is None else self._batch_graphs.nbytes
        if held + self.graphs.nbytes <= KEPT_IN_TRAINING:
            return True
        self.graphs.drop()
        # Recorded in every rollout anew, they would cost more than they save.
        self.graphs.prompts_rest = True
        return held <= KEPT_IN_TRAINING

    def _drop_ended_calls(self) -> None:
        """Clean up after calls that an exception left no time to."""
        for call in self._calls:
            if call.token() is None:
                call.release(None)
        self._calls = [call for call in self._calls if call.token() is not None]
        self.groups.settle()

    def settle(self) -> bool:
        """Clean up after calls and caches that have ended; False if another thread is at work."""
        return (self.turn.take(0), self._settle())[1]

    def _settle(self) -> bool:
        if self.turn.is_mine():
            self._drop_ended_calls()
        return self.turn.is_mine()

    @property
    def is_aside(self) -> bool:
        """Whether this thread is in a call that runs as if the model were not patched."""
        return self._aside.has_mine()

    @property
    def is_calling(self) -> bool:
        """Whether a `generate()` is under way in any thread."""
        return self._aside.has_any() or any(call.token() is not None for call in tuple(self._calls))

    @property
    def current(self) -> Call | None:
        """The innermost call of this thread; None outside of a call."""
        if not self._calls or not self.turn.is_mine():
            return None
        # Asked at every step: the common case first. A slice, since other threads may empty the list meanwhile.
        for last in self._calls[-1:]:
            if last.token() is not None:
                return last
        return next((call for call in reversed(self._calls) if call.token() is not None), None)

    @property
    def prefilling(self) -> bool:
        """Whether forwards compute the prompt of the innermost call."""
        # Asked at every step: the common case first, that the last call is the innermost and is not in its prompt.
        return bool(self._calls) and self._calls[-1].prefilling and self.current is self._calls[-1]

    @property
    def looping(self) -> bool:
        """Whether the device's loop of any call is under way."""
        return any(call.looping and call.token() is not None for call in self._calls)

    @looping.setter
    def looping(self, value: bool) -> None:
        call = self.current
        if call is not None:
            call.looping = value

    @property
    def expansion(self) -> Expansion | None:
        """How the innermost call repeated its inputs; None outside of a call."""
        call = self.current
        return None if call is None else call.expansion

    @expansion.setter
    def expansion(self, expansion: Expansion) -> None:
        call = self.current
        if call is not None:
            call.expansion = expansion

    @property
    def in_call(self) -> bool:
        """Whether this thread is in a `generate()`."""
        return self.current is not None

    @contextmanager
    def left_to_stocks_code(self) -> Iterator[None]:
        """A block of the innermost call between whose forwards no code of the user's runs: one look at modules will do."""
        call = self.current
        assert call is not None
        call.users_code, self.graphs.is_left_alone = False, True
        try:
            yield
        finally:
            # Whoever began the loop may go on with forwards of his own.
            call.users_code = True
            self.graphs.is_left_alone = False

    def is_private(self, cache: Any) -> bool:
        """Whether `cache` was made for the innermost call."""
        call = self.current
        if call is None or any(cache is lent.paged for lent in call.lent):
            return False
        return any(cache is own for own in call.caches)

    def keep_prefilled(self, outputs: Any) -> None:
        """The innermost call's prompt is computed; `take_prefilled` gives it to whoever would compute it again."""
        call = self.current
        assert call is not None
        call.prefilled = outputs

    def take_prefilled(self) -> Any:
        """What `keep_prefilled` was given, once; else None."""
        call = self.current
        if call is None:
            return None
        held, call.prefilled = call.prefilled, None
        return held

    def keep_encoded_from(self, inputs: dict[str, Any]) -> None:
        """The innermost call's towers have run over `inputs`; `take_encoded_from` gives them once."""
        call = self.current
        if call is not None:
            call.encoded_from = inputs

    def take_encoded_from(self) -> dict[str, Any]:
        """What `keep_encoded_from` was given, once; else nothing."""
        call = self.current
        if call is None:
            return {}
        held, call.encoded_from = call.encoded_from, {}
        return held

    @contextmanager
    def prefill(self, copies: list[int] | None = None) -> Iterator[None]:
        """Forwards inside compute the prompt, whose rows are repeated afterwards as `copies` says."""
        call = self.current or Call()
        before, call.prefilling, call.copies = call.prefilling, True, copies
        try:
            yield
        finally:
            call.prefilling, call.copies = before, None

    def groups_for(self, model: Any) -> PageGroups:
        """The pages of the model as it is now; those from before it was changed go with the caches that hold them."""
        wanted = (keys_dtype(model), _windows(model.config), model.device)
        if self._made_for[-1] is None and self._made_for[:-1] == wanted[:-1]:
            self._made_for = wanted
        if self._made_for != wanted:
            self.close_prefixes()
            groups = PageGroups(model.config, self.config, wanted[0], self.turn, self._key_ranks, self._alike)
            self.__dict__.update(groups=groups, _made_for=wanted)
        return self.groups

    def new_cache(
        self, model: Any, room: int, first: int, lender: DynamicCache | None = None, templates: list[Any] | None = None
    ) -> PagedCache:
        """A cache for the call under way.

        Args:
            model: whose keys it will hold.
            room: columns that the rows will have at most.
            first: columns that pages are made for before the prompt is computed.
            lender: a user's cache that it stands in for until the end of the call.
            templates: `template_layers` of the model's configuration, if they are known.
        """
        call = self.current
        assert call is not None
        config = model.config.get_text_config(decoder=True)
        templates = template_layers(config) if templates is None else templates
        cache = PagedCache.of_layers(templates, config, self.groups_for(model), self.counters, room)
        cache.first = first
        if lender is not None:
            call.lent.append(LentCache(lender, cache))
            call.lent[-1].lend()
        call.caches.append(cache)
        return cache

    def paged_of(self, cache: Any) -> Any:
        """The paged cache that stands in for `cache` in the innermost call; `cache` itself if there is none."""
        call = self.current
        lent = [] if call is None else call.lent
        return next((one.paged for one in lent if one.dynamic is cache), cache)

    def take_in(self, decoder: Any, cache: Any) -> Any:
        """`paged_of`, also for a filled `DynamicCache` that somebody puts in the place of the call's own: PEFT's prefix."""
        paged, call = self.paged_of(cache), self.current
        if paged is not cache or type(cache) is not DynamicCache or call is None or not call.caches:
            return paged
        if not cache.get_seq_length():
            return cache
        reason = why_not_lent(cache, decoder.config)
        if reason is not None:
            self.count_fallback(reason)
            return cache
        return self.new_cache(decoder, call.caches[0].room, call.caches[0].first, cache)
