"""`ForwardGraphs`: the captured forwards of one model's decoder: when they are made, used and dropped."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.crossing import Crossing
from hf_fastattn.cache.forward_states import ForwardStates
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.counters import CallCounters
from hf_fastattn.graphs.fingerprint import Fingerprint
from hf_fastattn.graphs.forward_entry import Entry
from hf_fastattn.graphs.graph_store import BY_ROW, GraphStore
from hf_fastattn.graphs.held_bytes import held_bytes
from hf_fastattn.graphs.placement import SEVERAL, route_of
from hf_fastattn.graphs.static_inputs import ForwardShape, StaticInputs, columns_for, is_captured, why_not_static
from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.layer_variants import LayerVariants
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.uncompiled import uncompiled

# Most graphs kept, of decode steps and of forwards of several tokens a row; the least recently used is evicted.
MAX_GRAPHS, MAX_EXTENDS = 8, 16
CHANGES = "the model was changed between two forwards of the call"
# Shapes seen once that are remembered; a shape is captured when it is seen again.
MAX_SHAPES = 256
# Bytes of states that are let go when another loop needs as many.
LARGE_STATES = 128 * 2**20
# Failed captures after which no more are tried, until the model changes.
MAX_FAILURES = 3
# Numbers of tokens that are multiples of it are alike to kernels.
EVEN = 64

Key = tuple[ForwardShape, int, int]


class ForwardGraphs(GraphStore[Key, Entry]):
    """Runs the decoder from graphs, one a shape, on a single device captured when a shape comes up for the second time.

    A shape is a decode step of a number of rows, or a bucket of tokens of a number of rows: prompts, drafts to verify,
    chat turns. Before the capture, layers launched one by one already read the same padded static inputs, so that the
    products have the same sizes, and give the same bits, captured or not. Over several devices the first forward of a shape
    is recorded: while it runs, if one of about its size has been launched, whose kernels are there, else behind its
    launches. Forwards of more tokens than `most_tokens` says keep the GPU busy for longer than their launches take, and are
    not captured.

    What a graph depends on beside its inputs (`fingerprint_of`) is compared at the first forward of every `generate()`, and
    before each where code of the user's runs between them, as in loops made by hand.

    Args:
        enabled: see `GraphStore`; `stocks_draws` likewise.
    """

    def __init__(
        self,
        enabled: bool,
        stocks_draws: bool = False,
        why_not_experts: Callable[..., str | None] | None = None,
        variants: LayerVariants | None = None,
    ) -> None:
        super().__init__(enabled, stocks_draws, why_not_experts, variants)
        self._seen: OrderedDict[Key, None] = OrderedDict()
        # Over several devices, about which sizes forwards had that were launched; None if recording one failed.
        self._launched: set[tuple[Key, bool]] | None = set()
        # The decoder whose fingerprint this call has compared.
        self._checked: weakref.ref[Any] | None = None
        # Weak reference to the token of the call under way; gives None once the call has ended.
        self._call: Callable[[], Any] | None = None
        # That of the last `check`.
        self._agreed: Fingerprint | None = None
        # Nothing changes the model between the forwards of the call under way.
        self.is_left_alone = False
        # Something has: it may be changed again, and recording would not pay. How often this call has looked.
        self._is_changing, self._looks = False, 0
        self._failures = 0
        self._resting = False
        self._states: ForwardStates | None = None
        # Of layers on several devices: why forwards do not pass through them, and else the devices that they pass through.
        self._crossing: tuple[str | None, tuple[torch.device, ...]] | None = None
        # Prompts are not recorded, and do not read static inputs: memory goes back after each call.
        self.prompts_rest = False

    def enter_call(self, call: Callable[[], Any] | None) -> None:
        """A `generate()` begins, or ends and the one around it, if any, goes on.

        Args:
            call: gives None once it has ended, however it did.
        """
        self.__dict__.update(_checked=None, _call=call, _resting=False, is_left_alone=False, _is_changing=False)

    def drop(self) -> None:
        """Forget all graphs, and the places of states; caches keep those that they hold."""
        super().drop()
        self._states = None
        if self._launched is not None:
            self._launched.clear()

    def forget(self) -> None:
        """`drop`, and count shapes and failures anew."""
        super().forget()
        self._seen.clear()
        self._failures, self._resting = 0, False

    @property
    def history(self) -> tuple[int, ...]:
        """See `GraphStore`; a shape is recorded when it comes again."""
        return *super().history, len(self._seen), self._failures

    def check(self, decoder: Any, device: torch.device, is_known: bool = False) -> bool:
        """See `GraphStore`.

        Args:
            is_known: the decoder is as it was at the check before, as a look at the model around it has shown.
        """
        if not self.records_on(device):
            return True
        # Forwards of the user's own may have compared another state since.
        if is_known and self._in_call and self._fingerprint is self._agreed:
            self._checked = weakref.ref(decoder)
            return True
        before = self._fingerprint
        self._why_not_decoder(decoder, device, lambda: SEVERAL)
        self._agreed = self._fingerprint
        return self._fingerprint is before

    def make_room(self) -> None:
        """The device's loop is about to hold states too: large ones are not kept twice."""
        if self._states is not None and held_bytes(self._states, self._states.device) > LARGE_STATES:
            self.drop()

    @property
    def nbytes(self) -> int:
        """Bytes that all graphs compute in, and of states."""
        states = self._states
        return super().nbytes + (0 if states is None else held_bytes(states, states.device))

    @property
    def _in_call(self) -> bool:
        return self._call is not None and self._call() is not None

    def run(
        self,
        decoder: Any,
        arguments: dict[str, Any],
        cache: PagedCache,
        kwargs: dict[str, Any],
        forward: Callable[..., Any],
        counters: CallCounters,
        why_not: str | None = None,
        why_not_spread: Callable[[], str | None] = lambda: SEVERAL,
    ) -> Any | None:
        """The decoder's output; None if its layers have to be launched one by one for inputs as they are.

        Args:
            arguments: `input_ids` or `inputs_embeds`, `position_ids`, and what else the decoder takes: `[B, S]`, or
                `[1, T]` where padding was taken out; what a mask says, `cache` knows.
            cache: a paged forward of it is under way.
            kwargs: what else the decoder was given.
            forward: the decoder's own, called with it.
            counters: where captures and replays are counted.
            why_not: this decode step cannot be recorded, if there is a reason that neither arguments nor modules show.
            why_not_spread: why `forward` does not go from device to device by itself, where layers are on several.
        """
        tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
        batch = cache.paged_batch
        if not self.records_on(tokens.device) or batch is None:
            return None
        is_decode = batch.is_decode and tokens.shape[:2] == (batch.rows, 1)
        if (is_decode and cache.past_columns == 0) or (not is_decode and not is_captured(decoder, batch.tokens)):
            return None
        # The model's own dtype would be looked for among all its parameters, at every step. No tensor of the pages is held
        # here: they may be about to grow.
        dtype = next(iter(cache.groups)).storage.dtype or decoder.dtype
        if self.why_not_backend(cache.groups, tokens.device, dtype) is not None:
            return None
        if cache.recurrent_layers and not (is_decode and cache.has_states):
            return None
        reason = why_not or why_not_static(decoder, arguments, kwargs)
        reason = reason or self._why_not_decoder(decoder, tokens.device, why_not_spread)
        if is_decode and reason is not None:
            self.count_reason(reason, counters)
        elif is_decode:
            cache.grow_tensors()
        elif self._resting or self._steps_alone or self.prompts_rest or self._failures >= MAX_FAILURES:
            return None
        if reason is not None:
            return None
        shape = ForwardShape.of(arguments, batch, is_decode)
        key = (shape, decoder.config.num_hidden_layers, id(cache.groups))
        hidden = self._hidden(key, decoder, arguments, cache, forward, counters, why_not_spread)
        if hidden is None:
            return None
        states, kind = hidden
        if not is_decode:
            states = states[0, : batch.tokens].view(*tokens.shape[:2], -1)
        outputs = kind(last_hidden_state=states, **{CACHE: cache})
        return outputs.to_tuple() if kwargs.get("return_dict", decoder.config.return_dict) is False else outputs

    def _hidden(
        self,
        key: Key,
        decoder: Any,
        arguments: dict[str, Any],
        cache: PagedCache,
        forward: Callable[..., Any],
        counters: CallCounters,
        why_not_spread: Callable[[], str | None],
    ) -> tuple[Tensor, Any] | None:
        """The last hidden states over static inputs, and the class of the output; None for a decode step not captured."""
        batch, is_decode = cache.paged_batch, key[0].bucket is None
        assert batch is not None
        needed, worth_having = columns_for(cache, batch.known.seq_lens)
        # A graph neither moves pages nor makes them; layers launched one by one do.
        settled, entry = not cache.groups.is_growing(cache.tables), self._entries.get(key)
        if settled and entry is not None and entry.fits(cache, needed):
            entry.write(arguments, cache, batch)
            self._entries.move_to_end(key)
        elif self.is_spread and why_not_spread() is not None:
            # Something has changed that graphs do not depend on.
            return None
        elif self._is_due(key) and settled:
            entry = self._capture(key, worth_having, decoder, arguments, cache, forward, counters)
        else:
            entry = None
        if entry is not None:
            if is_decode:
                counters.graphs_replayed += 1
            else:
                counters.appends_replayed += 1
            return self._replay(entry, decoder, forward, cache), entry.outputs
        if is_decode:
            return None
        entry = self._entry(key, worth_having, cache)
        if entry.crossing is not None and self._launched is not None:
            hidden = self._capture_first(key, entry, decoder, arguments, cache, forward, counters)
            if hidden is not None:
                return hidden, entry.outputs
            entry = self._entry(key, worth_having, cache)
        self.wait()
        entry.write(arguments, cache, batch)
        return entry.launcher(decoder, forward, cache)(), entry.outputs

    @staticmethod
    def _replay(entry: Entry, decoder: Any, forward: Callable[..., Any], cache: PagedCache) -> Tensor:
        if entry.states is not None:
            entry.states.take(cache)
        hidden = entry.recorded.replay(entry.launcher(decoder, forward, cache))
        if entry.states is not None:
            entry.states.written(cache)
        return hidden

    def _why_not_decoder(self, decoder: Any, device: torch.device, why_not_spread: Callable[[], str | None]) -> str | None:
        first = self._checked is None or self._checked() is not decoder or not self._in_call
        if first or not self.is_left_alone:
            before = self._fingerprint
            if not self.compare(decoder, device):
                self.drop()
                self._failures, self._resting, self._crossing, self._launched = 0, False, None, set()
            self._looks = 1 if first else self._looks + 1
            # The first forward may change it once: PEFT's takes a merged adapter that is disabled out of the weights.
            self._is_changing |= self._looks > 2 and self._fingerprint != before
            self._checked = weakref.ref(decoder) if self._in_call else None
        if self._is_changing:
            return CHANGES
        if self._reason is None and self.adapter_names is not None:
            return BY_ROW
        if self._reason is not None or not self.is_spread:
            return self._reason
        if self._crossing is None:
            self._crossing = why_not_spread(), route_of(decoder, None, device)
        return self._crossing[0]

    def _is_due(self, key: Key) -> bool:
        if self._resting or self._failures >= MAX_FAILURES:
            return False
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > MAX_SHAPES:
            self._seen.popitem(last=False)
        return False

    def _capture_first(
        self,
        key: Key,
        entry: Entry,
        decoder: Any,
        arguments: dict[str, Any],
        cache: PagedCache,
        forward: Callable[..., Any],
        counters: CallCounters,
    ) -> Tensor | None:
        """The last hidden states of a shape's first forward over several devices, which is recorded; None if that failed."""
        batch, recorded, about = cache.paged_batch, cast(Any, entry.recorded), _about(key, cache)
        assert batch is not None and self._launched is not None
        try:
            cache.grow_tensors()
            self.wait()
            entry.write(arguments, cache, batch)
            run = entry.launcher(decoder, forward, cache)

            def settled() -> None:
                entry.storage_version = cache.groups.storage_version

            with uncompiled():
                if about in self._launched and not cache.groups.is_growing(cache.tables):
                    settled()
                    hidden: Tensor = recorded.capture_running(run)
                else:
                    # Layers that are launched make the tensors of pages where there were none.
                    hidden = recorded.capture_launched(run, settled)
            if not entry.fits(cache, 0):
                raise RuntimeError("pages were moved meanwhile")
        except Exception as error:
            # A workspace may have grown meanwhile whose counters were not zeroed; what was written is written again.
            self.drop()
            self._launched = None
            self.count_reason(f"recording a first forward failed with {type(error).__name__}: {error}", counters)
            return None
        self._launched.add(about)
        self._keep(key, entry, counters)
        return hidden

    def _keep(self, key: Key, entry: Entry, counters: CallCounters) -> None:
        decode = key[0].bucket is None
        self.keep(key, entry, MAX_GRAPHS if decode else MAX_EXTENDS, lambda other: (other[0].bucket is None) == decode)
        if decode:
            counters.graphs_captured += 1
        else:
            counters.appends_captured += 1

    def _capture(
        self,
        key: Key,
        columns: int,
        decoder: Any,
        arguments: dict[str, Any],
        cache: PagedCache,
        forward: Callable[..., Any],
        counters: CallCounters,
    ) -> Entry | None:
        self._entries.pop(key, None)
        groups, batch = cache.groups, cache.paged_batch
        assert batch is not None
        warmed_up, entry, failure = False, None, None
        try:
            entry = self._entry(key, columns, cache)
            entry.write(arguments, cache, batch)

            def after_first() -> None:
                nonlocal warmed_up
                warmed_up, entry.storage_version = True, groups.storage_version

            with uncompiled():
                entry.recorded.capture(entry.launcher(decoder, forward, cache), after_first)
            if not entry.fits(cache, 0):
                raise RuntimeError("pages were moved meanwhile")
        except Exception as raised:
            failure = raised
        error = self.agreed(failure, warmed_up)
        if entry is None or error is not None:
            # The forward then runs layer by layer; if the cause was not the capture, it fails there.
            self.drop()
            self._failures, self._resting = self._failures + 1, True
            self.count_reason(f"capturing it failed with {type(error).__name__}: {error}", counters)
            return None
        self._keep(key, entry, counters)
        return entry

    def _entry(self, key: Key, columns: int, cache: PagedCache) -> Entry:
        # Not before: it imports Triton.
        from hf_fastattn.kernels.attention.workspace import Workspace

        device, groups = key[0].device, cache.groups
        if self.workspace is None or self.workspace.device != device:
            self.workspace = Workspace(device)
        inputs = StaticInputs(key[0], columns, cache.tables)
        batch = inputs.batch(groups.backend, groups.batch_invariant, self.workspace)
        held = self._reference(groups, key)
        if self.is_spread and self._crossing is not None and len(self._crossing[1]) > 1:
            return self._spread_entry(self._crossing[1], inputs, batch, groups, held)
        states = self._states_for(cache)
        return Entry(inputs, batch, self.new_forward(device), held, states=states)

    def _spread_entry(
        self,
        route: tuple[torch.device, ...],
        inputs: StaticInputs,
        batch: Batch,
        groups: PageGroups,
        held: weakref.ref[PageGroups],
    ) -> Entry:
        """One of a forward that passes through several devices."""
        from hf_fastattn.kernels.attention.workspace import Workspace

        places, followers = tuple(dict.fromkeys(route)), list[StaticInputs]()
        batches, positions = {places[0]: batch}, {places[0]: inputs.position_ids}
        for place in places[1:]:
            self._workspaces.setdefault(place, Workspace(place))
            followers.append(inputs.on(place))
            positions[place] = followers[-1].position_ids
            batches[place] = followers[-1].batch(groups.backend, groups.batch_invariant, self._workspaces[place])
        recorded, crossing = self.new_staged_forward(places), Crossing(batches, positions, self.send)
        return Entry(inputs, batch, recorded, held, crossing=crossing, followers=tuple(followers))

    def _states_for(self, cache: PagedCache) -> ForwardStates | None:
        """Places for the states of the cache's rows, with the states in them; None if it has none."""
        layers, rows = cache.recurrent_layers, len(cache.lengths)
        if not layers:
            return None
        states = self._states
        if states is None or not states.fits(layers, rows):
            # At least as many as before, so that calls of two sizes do not replace each other's.
            states = ForwardStates(layers, max(rows, 0 if states is None else states.rows))
            # What graphs read, and the memory of it, goes before there is more: places are made when states are taken.
            self._entries.clear()
            self._states = states
        states.take(cache)
        return states

    def _reference(self, groups: PageGroups, key: Key) -> weakref.ref[PageGroups]:
        owner = weakref.ref(self)

        def gone(_: Any) -> None:
            graphs = owner()
            if graphs is not None:
                graphs._entries.pop(key, None)

        return weakref.ref(groups, gone)


def _about(key: Key, cache: PagedCache) -> tuple[Key, bool]:
    """What forwards have in common that launch the same kernels: about as many tokens, in buckets of one alignment.

    Where steps follow, their kernels are compiled beside those of the prompt's launches.
    """
    shape, layers, groups = key
    assert shape.bucket is not None
    bucket = power_of_2(shape.bucket) if shape.bucket % EVEN == 0 else -shape.bucket
    return (replace(shape, bucket=bucket), layers, groups), cache.steps_to_come > 0
