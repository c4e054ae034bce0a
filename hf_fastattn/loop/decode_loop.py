"""`DecodeLoop`: decode steps replayed without host code in between; each prepares the inputs of the next one.

A recorded step takes the tokens that the step before has chosen, runs the model, chooses the next ones and prepares what
comes after. The host launches steps, gives rows pages ahead of time, and reads what was chosen a few steps late; what
was computed past the end is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.crossing import Crossing
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_groups import PrefixGroups, sharing_order
from hf_fastattn.cache.row_states import RowStates
from hf_fastattn.counters import CallCounters
from hf_fastattn.graphs.module_checks import why_not_module
from hf_fastattn.graphs.placement import place_of, route_of
from hf_fastattn.kernels.attention.configs import short_heads
from hf_fastattn.kernels.rehearsal import compile_ahead
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.kernels.sampling.loop_tensors import LoopTensors
from hf_fastattn.kernels.sampling.slide import slide
from hf_fastattn.loop.device_state import DeviceState, bucket_of
from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.loop.generated_rows import GeneratedRows
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.loop.readback import DEPTH, StepTokens
from hf_fastattn.loop.request import LoopRequest
from hf_fastattn.loop.row_adapters import RowAdapters
from hf_fastattn.loop.token_choice import choose
from hf_fastattn.pages.page_pool import CacheFullError
from hf_fastattn.pages.reach import AHEAD

# Capture a graph for a smaller batch only if at least this many steps can still follow.
WORTH_CAPTURING = 128


class DecodeLoop:
    """One call's loop, from the logits of the prompt to the new tokens.

    Args:
        model: patched.
        graphs: of the model, with its static tensors.
        counters: of the call.
        request: what the call asks for.
        cache: holds the prompt; grows with every step.
        input_ids: `[B, S]` the prompt.
        positions: `[B, 1]` of the first new token.
        vocabulary: size of the logits.
        private: nobody sees the cache after the call, so rows that have finished may leave it.
        forward: the decoder's forward, called as `forward(decoder, cache, **arguments)`.
        logits_of: called with `lm_head` and `[T, hidden]`.
        streamer: gets the tokens of every step, `[B]` on the host.
        limits: new tokens a row, at most; those of the request by default.
        adapters: of the rows, if they have different ones.
        has_changed: says whether the streamer, called just before, has changed the model; the loop ends there then, and a
            forward of the last token has not been computed.
        keep: called with a row of the cache, its number in the call and its new tokens, `[n]` on the host, before the row
            leaves the cache, or at the end.
    """

    # Rows go on as others.
    _moves = False

    def __init__(
        self,
        model: Any,
        graphs: LoopGraphs,
        counters: CallCounters,
        request: LoopRequest,
        cache: PagedCache,
        input_ids: Tensor,
        positions: Tensor,
        *,
        vocabulary: int,
        private: bool,
        forward: Callable[..., Any],
        logits_of: Callable[[Any, Tensor], Tensor],
        streamer: Any = None,
        limits: Sequence[int] | None = None,
        adapters: RowAdapters | None = None,
        has_changed: Callable[[], bool] | None = None,
        keep: Callable[[int, int, NDArray[np.int64]], None] | None = None,
    ) -> None:
        self._model, self._counters, self._request, self._cache = model, counters, request, cache
        self._decoder = model._fastattn.decoder(model)
        self._forward, self._logits_of, self._streamer, self._keep = forward, logits_of, streamer, keep
        self._has_changed = has_changed
        # The streamer has changed the model, and rows go on.
        self.is_cut_short = False
        rows = input_ids.shape[0]
        self._limits = list(limits) if limits is not None else [request.max_new] * rows
        self._most = max(self._limits)
        self._rows = GeneratedRows(input_ids, self._most, request)
        # For each row on the device, its number in the call.
        self._numbers = list(range(rows))
        self._used = bucket_of(rows)
        self._launched = 0
        # Some layers may know of what others do not.
        self._is_changing = False
        # Tokens a row that are in the cache's lengths: those of steps that were read back.
        self._appended = 0
        self._reserved = 0
        self._graphs = graphs
        page_size = cache.groups.page_size
        # The devices of the layers in their order, and where tokens are chosen, which is where they are given if it is one.
        self._route: tuple[torch.device, ...] = (input_ids.device,)
        if graphs.is_spread:
            self._route = route_of(self._decoder, None, model.device)
        device = place_of(model.lm_head, self._route[-1])
        self._stream = cache.stream
        # A row's at the end of the call.
        self._keys = max(cache.lengths) + self._most
        columns = -(-self._keys // page_size)
        columns = columns if self._stream is None else self._stream.pages
        model._fastattn.runtime.variants.reach(self._keys)
        self._state: DeviceState = self._graphs.state_for(device, self._used, columns, cache, vocabulary, self._route)
        self._state.slides = self._stream is not None
        assert self._graphs.readback is not None
        self._readback = self._graphs.readback
        self._drop = private and bool(request.ends or request.stop_strings or limits is not None)
        self._adapters = None if adapters is None else adapters.names
        numbers = () if adapters is None else adapters.numbers
        self._state.begin(request, cache.lengths, positions, self._limits, self._drop, numbers)
        self._ranks = self._graphs.ranks
        if self._ranks is not None and request.do_sample:
            self._ranks.take_first(self._state.seed)
        if request.choice.repetition_penalty != 1.0:
            self._state.see(input_ids, request.ignored)
        self._history = self._state.processors.begin(request.processors, input_ids, self._most)
        self._forced = 0 if request.forced is None else self._state.force(request.forced.tokens)
        self._recorded = tuple((type(one), one.sizes()) for one in request.processors)
        # A variant may read the number of a row.
        self._numbered = model._fastattn.runtime.variants.reads_row
        # In batch-invariant mode the order of a row's sums may not depend on other rows.
        alone = cache.groups.batch_invariant or self._numbered
        # The states of linear attention stay where they are, and the beams of a prompt side by side.
        stays = alone or self._moves or None not in cache.tables or bool(cache.recurrent_layers)
        # Rows that let tokens go are ordered by nothing, and share only their sinks.
        stays |= self._stream is not None
        # A single token takes no step, which could read pages together.
        self._order = None if stays or self._most == 1 else sharing_order(cache.tables[None])
        shares = not alone and not self._order and self._stream is None and self._most > 1
        self._prefixes = _prefix_groups(cache) if shares else PrefixGroups()
        self._key = self._key_for(self._used, self._prefixes)
        self._write_groups()
        self._private, self._depth = private, DEPTH
        if self._stream is not None and not private and (request.ends or request.stop_strings):
            # What a row has let go cannot be brought back: no step may run after the last one.
            self._depth = 0
        self._states: RowStates | None = None

    def run(self, logits: Tensor) -> Tensor:
        """Generate.

        Args:
            logits: `[B, V]` after the prompt.

        Returns:
            `[B, new]` int64 tokens on the host, as long as the longest row; shorter rows are padded.

        Raises:
            CacheFullError: no pages are left. The cache holds what was generated so far.
        """
        logits = logits.to(self._state.device, non_blocking=True)
        try:
            self._take_states()
            if self._stream is not None:
                self._cache.own_rows(self._most - 1)
            if self._most > 1 or self._moves or self._stream is not None:
                self._reserve()
            self._rehearse(logits)
            packed = self._finish_step(self._key_for(len(self._numbers)), logits)
            self._launched = 1
            self._counters.fast_loops += 1
            self._readback.send(packed, self._numbers)
            if self._order is not None and self._most > 1:
                self._arrange(self._order)
            while not self._rows.done and not self.is_cut_short:
                if self._launched < self._most and len(self._readback) <= self._depth:
                    self._launch()
                arrived = self._receive(len(self._readback) > self._depth or self._launched == self._most)
                while arrived is not None and not self._rows.done and not self.is_cut_short:
                    self._take(arrived)
                    arrived = self._receive(False)
        finally:
            self._close()
        if self._request.forced is not None:
            self._note_forced(self._request.forced)
        return self._rows.tokens()

    def _note_forced(self, forced: ForcedTokens) -> None:
        """Hand over what the steps have said of the forced tokens."""
        held, rows, steps = self._state.forced, len(forced.tokens), self._rows.steps
        forced.note(held.logprobs[:rows, :steps], held.choices[:rows, :steps])

    def _receive(self, waits: bool) -> StepTokens | None:
        """The oldest step under way, if it has arrived or the loop is to wait for it."""
        if self._ranks is None:
            return self._readback.receive(waits)
        # Whether a step has arrived early differs from rank to rank, and what follows from it must not.
        return self._ranks.waits(lambda: self._readback.receive(True)) if waits else None

    @property
    def steps(self) -> int:
        """Steps whose tokens were read, and so belong to the call."""
        return self._rows.steps

    def _take_states(self) -> None:
        """Have the states of linear-attention layers, if there are any, in slots that steps read and write."""
        if not self._cache.recurrent_layers or self._most == 1:
            return
        if (not self._private and (self._request.ends or self._request.stop_strings)) or self._has_changed is not None:
            # A state cannot be cut back to an earlier token: no step may run after the last one.
            self._depth = 0
        self._model._fastattn.runtime.graphs.make_room()
        self._is_changing = True
        self._states = self._graphs.row_states_for(self._cache, self._used, self._moves)
        self._is_changing = False

    def _rehearse(self, logits: Tensor) -> None:
        """Have the kernels of the choice compiled, and the output layer's, if it is the first of its kind."""
        first, rehearsed = self._key_for(len(self._numbers)), self._model._fastattn.runtime.rehearsed
        kind = (first, self._key, logits.dtype, logits.shape[-1], self._most > 1)
        if kind in rehearsed:
            return
        rehearsed.add(kind)
        head = self._model.lm_head
        # What is not launched is arbitrary: only kernels may read it, and nobody else's code is called once more.
        if self._moves or self._recorded or self._history or self._forced or why_not_module(head, logits.device) is not None:
            return

        def run() -> None:
            self._finish_step(first, logits)
            if self._most > 1:
                width = self._model.config.get_text_config(decoder=True).hidden_size
                hidden = torch.zeros(self._used, width, dtype=self._model.dtype, device=logits.device)
                self._finish_step(self._key, self._logits_of(head, hidden))

        compile_ahead(logits.device, run)

    # ---- the device's part ------------------------------------------------------------------------------------

    def _key_for(self, rows: int, shared: PrefixGroups | None = None) -> GraphKey:
        request, worth = self._request, (shared or PrefixGroups()).worthwhile()
        return GraphKey(
            rows, request.do_sample, request.choice.repetition_penalty != 1.0, request.choice.min_new_tokens > 0,
            worth.sharers, worth.group_count, len(worth.levels) if worth.groups else 0, self._recorded, self._history,
            self._adapters, forced=self._forced, short=short_heads(rows, self._keys),
        )  # fmt: skip

    def _launch(self) -> None:
        # A step also computes the slot of the token that it chooses.
        if self._reserved <= min(self._launched, self._most - 2):
            self._reserve()
        key, self._is_changing = self._key, True
        packed = self._graphs.replay(key, self._cache.groups, self._step(key), self._counters)
        self._launched, self._is_changing = self._launched + 1, False
        self._readback.send(packed, self._numbers)

    def _step(self, key: GraphKey) -> Callable[[], Tensor]:
        def run() -> Tensor:
            state, cache, graphs, first = self._state, self._cache, self._graphs, self._route[0]
            groups, decoder = cache.groups, self._decoder
            batches = {
                place: state.batch(key, groups.backend, groups.batch_invariant, graphs.workspace_on(place), place)
                for place in state.inputs
            }
            crossing = None
            if len(batches) > 1:
                graphs.ahead(state.follow)
                positions = {place: inputs.positions[: key.rows] for place, inputs in state.inputs.items()}
                crossing = Crossing(batches, positions, graphs.send)
            with cache.using(batches[first], self._states, crossing):
                arguments = {**state.arguments(key.rows, first), "use_cache": True, "return_dict": True}
                hidden = self._forward(decoder, cache, **arguments).last_hidden_state
            for batch in batches.values():
                batch.forget_tables()
            if self._route[-1] != state.device:
                hidden = graphs.send([hidden], state.device)[0]
            return self._finish_step(key, self._logits_of(self._model.lm_head, hidden.flatten(0, 1)))

        return run

    def _finish_step(self, key: GraphKey, logits: Tensor) -> Tensor:
        """Choose tokens by `logits [rows, V]`, and prepare the next step."""
        state = self._state
        choose(state, key, logits)
        # The first choice is for the prompt's rows alone; its padding rows are prepared too.
        tensors: LoopTensors = state.tensors(max(key.rows, self._used), key.penalised)
        if self._stream is not None:
            layout, table = self._stream, tensors.tables[0, : len(tensors.seq_lens)]
            slide(
                tensors.seq_lens, table, page_size=layout.page_size, sinks=layout.sinks, leaving=layout.leaving,
                pages=layout.pages,
            )  # fmt: skip
        advance(tensors, self._cache.groups.page_size)
        if key.history:
            state.processors.note(tensors.tokens, tensors.step)
        return tensors.packed

    # ---- the host's part --------------------------------------------------------------------------------------

    def _take(self, step: StepTokens) -> None:
        """A step has arrived: note its tokens, pass them on, and let rows go that have finished."""
        late = self._rows.take(step)
        if self._rows.steps > 1:
            # A step appends the token that the step before it has chosen.
            self._cache.grow_by(1)
            self._appended += 1
        if self._streamer is not None:
            self._streamer.put(self._rows.newest())
            if self._has_changed is not None and not self._rows.done and self._has_changed():
                self.is_cut_short = True
                return
        late_rows = [index for index, number in enumerate(self._numbers) if number in late]
        if late_rows:
            self._state.finish_rows(late_rows, self._drop)
        if self._drop and not self._rows.done:
            self._release_finished()

    def _release_finished(self) -> None:
        """Release what finished rows hold, and go on with fewer rows where a smaller step is there or worth capturing."""
        finished = [index for index, number in enumerate(self._numbers) if self._rows.finished[number]]
        if any(self._cache.lengths[index] for index in finished):
            self._keep_rows(finished)
            self._cache.release_rows(finished)
        count = len(self._numbers) - len(finished)
        used = bucket_of(count)
        if used >= self._used or self._numbered:
            return
        kept = sorted(set(range(len(self._numbers))) - set(finished))
        key, left = self._key_for(used, self._prefixes.keep(kept)), self._most - self._launched
        if self._graphs.has(key, self._cache.groups.storage_version) or left >= WORTH_CAPTURING:
            self._compact(kept, used)

    def _arrange(self, order: list[int]) -> None:
        """Go on with the rows in another order, in which those that share pages are neighbours."""
        self._state.keep(order, self._used)
        self._numbers = [self._numbers[index] for index in order]
        self._cache.keep_rows(order)
        self._cache.regroup()
        self._prefixes = _prefix_groups(self._cache)
        self._key = self._key_for(self._used, self._prefixes)
        self._write_groups()
        self._write_tables()

    def _compact(self, kept: list[int], used: int) -> None:
        """Go on with the rows `kept`, in a step of `used` rows."""
        self._state.keep(kept, used, tables=self._stream is not None)
        if self._states is not None:
            self._states.keep(kept, used)
        self._numbers = [self._numbers[index] for index in kept]
        self._cache.keep_rows(kept)
        self._used = used
        self._prefixes = self._prefixes.keep(kept)
        self._key = self._key_for(used, self._prefixes)
        self._write_groups()
        if self._stream is None:
            self._write_tables()

    def _reserve(self) -> None:
        """Pages for the steps to come, AHEAD of them if the memory limit allows."""
        # By the lengths on the host, which lag: steps not read back may still be dropped.
        self._cache.release_behind()
        appended = max(self._launched - 1, 0)
        wanted = min(AHEAD, self._most - 1 - appended)
        if self._stream is not None:
            # At once: from then on the device alone knows the order of a row's pages.
            wanted = self._most - 1
        while wanted:
            try:
                # Steps that were launched but not read back have appended tokens that the cache's lengths do not count yet.
                self._cache.reserve_more(appended - self._appended + wanted)
                break
            except CacheFullError:
                if wanted <= 1 or self._stream is not None:
                    raise
                wanted //= 2
        self._reserved = appended + wanted
        self._cache.grow_tensors()
        self._write_tables()

    def _write_tables(self) -> None:
        self._state.write_tables([table.as_array()[0] for table in self._cache.tables.values()])

    def _write_groups(self) -> None:
        if self._key.sharers:
            self._state.write_groups(self._key, self._prefixes)

    def _keep_rows(self, rows: Sequence[int]) -> None:
        """Say what these rows of the cache hold, which nobody writes to any more."""
        # After a stop string the device, which does not know of it, has gone on with other tokens than the host.
        unsure = self._request.stop_strings is not None and not self._drop
        for index in rows:
            number = self._numbers[index]
            if self._keep is not None and self._cache.lengths[index] and not (unsure and self._rows.finished[number]):
                self._keep(index, number, self._rows.new_of(number))

    def _close(self) -> None:
        """The cache is as it is after the steps that were read, whatever else is under way."""
        self._readback.clear()
        taken, counters = self._rows.steps, self._counters
        extra = max(self._launched - 1, 0) - max(taken - 1, 0)
        if (not self._private or self.is_cut_short) and self._cache.recurrent_layers:
            self._give_states_back(extra)
        if not self._private and self._stream is not None and extra:
            # An interrupted call's, which rows have made room for.
            self._cache.grow_by(extra)
        self._cache.trim()
        if self._rows.done:
            self._keep_rows(range(len(self._numbers)))
        if self._numbers != sorted(self._numbers):
            self._cache.keep_rows(sorted(range(len(self._numbers)), key=self._numbers.__getitem__))
        counters.forwards += max(taken - 1, 0)
        counters.graphs_replayed = max(counters.graphs_replayed - extra, 0)

    def _give_states_back(self, extra: int) -> None:
        """The cache holds the states again, and if the call was interrupted also the `extra` tokens that these know of."""
        if self._is_changing:
            self._cache.reset()
        elif self._states is not None:
            self._cache.grow_by(extra)
            self._states.store(self._cache.recurrent_layers, self._cache.lengths)


def _prefix_groups(cache: PagedCache) -> PrefixGroups:
    """Which rows of the prompt share pages of the layers that see all keys."""
    table = cache.tables.get(None)
    keys = None if table is None else cache.groups.group(None).storage.any_pages()
    return PrefixGroups.of(table, keys, cache.lengths)
