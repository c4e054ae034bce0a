"""`LoopGraphs`: decode steps of one model, from token to token, as CUDA graphs, one for each `GraphKey`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hf_fastattn.autocast import autocast_as, forward_dtype, why_not_forward
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.row_states import RowStates
from hf_fastattn.counters import CallCounters
from hf_fastattn.graphs.graph_store import BY_ROW, GraphStore
from hf_fastattn.graphs.held_bytes import held_bytes
from hf_fastattn.graphs.module_checks import why_not_kind
from hf_fastattn.graphs.placement import SEVERAL
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.graphs.staged_forward import StagedForward
from hf_fastattn.graphs.weight_copies import WORTH_COPYING, WeightCopies, copies_fit
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.layer_variants import LayerVariants
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.readback import Readback
from hf_fastattn.pages.page_groups import PageGroups

if TYPE_CHECKING:
    from hf_fastattn.loop.device_state import DeviceState

logger = logging.getLogger("hf_fastattn")

# Most recorded steps kept; the least recently used is evicted.
MAX_GRAPHS = 24
# Sets of adapters that rows choose from whose stacks are kept.
MAX_STACKS = 4

Names = tuple[str, ...] | None


class Refreshed(Protocol):
    """Copies of weights that are written anew before each call."""

    def refresh(self) -> None: ...


@dataclass
class RecordedStep:
    """One captured step; it is captured again when pages have moved."""

    recorded: RecordedForward | StagedForward
    storage_version: int


class LoopGraphs(GraphStore[GraphKey, RecordedStep]):
    """Recorded steps, and the static tensors that they share."""

    def __init__(
        self,
        enabled: bool,
        stocks_draws: bool = False,
        why_not_experts: Callable[..., str | None] | None = None,
        variants: LayerVariants | None = None,
    ) -> None:
        super().__init__(enabled, stocks_draws, why_not_experts, variants)
        self._groups: weakref.ref[PageGroups] | None = None
        self._failed: set[GraphKey] = set()
        self.state: DeviceState | None = None
        self.readback: Readback | None = None
        self.row_states: RowStates | None = None
        self.copies: WeightCopies | None = None
        self._stacks: dict[Names, Refreshed | None] = {}
        # The devices that steps pass through.
        self._route: tuple[torch.device, ...] = ()

    def drop(self) -> None:
        """Forget all steps and their memory."""
        super().drop()
        self._failed.clear()
        self.state = self.readback = self.copies = self.row_states = None
        self._stacks = {}

    @property
    def history(self) -> tuple[int, ...]:
        """See `GraphStore`; what failed is not tried again, and steps differ with copies of weights."""
        return *super().history, len(self._failed), int(self.copies is not None)

    def why_not_here(self, model: Any, cache: Any) -> str | None:
        """Why options, cache, device or backend rule out loop graphs; None if `why_not` has to look at the modules."""
        if not self._enabled:
            return "cuda_graphs=False"
        if cache is None:
            return "the call has no cache"
        if not isinstance(cache, PagedCache):
            return f"the cache is a {type(cache).__name__}"
        device = model.device
        if device.type not in self.forward_type.devices:
            return f"the model is on {device.type}"
        replaced = why_not_forward(model)
        if replaced is not None:
            return replaced
        return self.why_not_backend(cache.groups, device, model.dtype)

    def why_not(self, model: Any, cache: PagedCache, by_row: bool = False, spread: bool = False) -> str | None:
        """Why the modules of the model do not allow it; None if they do.

        `by_row`: steps know which adapter each row has, if PEFT was asked for several. `spread`: they know on which device
        each layer is.

        Forgets the steps if anything that they depend on, beside their inputs, is not as it was.
        """
        with autocast_as(model.device, forward_dtype(model)):
            unchanged = self.compare(model, model.device)
        if not unchanged or self._groups is None or self._groups() is not cache.groups:
            self.drop()
            self._groups = weakref.ref(cache.groups)
        chosen = None if by_row or self.adapter_names is None else BY_ROW
        return why_not_kind(model) or self._reason or chosen or (SEVERAL if self.is_spread and not spread else None)

    @property
    def nbytes(self) -> int:
        """Bytes of graphs, of what their steps read and write, and of copies of weights and of adapters."""
        if self.state is None:
            return super().nbytes
        copies = 0 if self.copies is None else self.copies.nbytes
        held = (self.state, self._stacks, self.row_states)
        return super().nbytes + copies + held_bytes(held, self.state.device)

    def copies_for(
        self,
        device: torch.device,
        weights: Callable[[], Sequence[Tensor]],
        dtype: torch.dtype | None,
        steps: int,
        to_come: int,
    ) -> WeightCopies | None:
        """Copies of the weights as they are now, for a call of so many steps under autocast to `dtype`.

        `weights` gives those that steps read; `to_come` is the memory, in bytes, that the call may take yet for its pages.

        None without autocast, or where they do not pay or do not fit: steps then round the weights as they read them.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            return None
        if self.copies is None and steps >= WORTH_COPYING:
            found = weights()
            fit = copies_fit(device, WeightCopies.bytes_needed(found, dtype), to_come)
            # Steps are recorded anew where copies are made, which ranks have to do together.
            if fit if self.ranks is None else self.ranks.everywhere(fit):
                # Steps recorded before read the weights themselves.
                self._entries.clear()
                self.copies = WeightCopies(found, dtype)
        if not self.copies:
            return None
        self.wait()
        self.copies.refresh()
        return self.copies

    def stacks_for(self, names: Names, make: Callable[[], Refreshed | None]) -> Any:
        """What `make` gives for these adapters, made once for as long as the model is as it is, and refreshed."""
        if names not in self._stacks:
            if len(self._stacks) >= MAX_STACKS:
                self._entries.clear()
                self._stacks.clear()
            self._stacks[names] = make()
        held = self._stacks[names]
        if held is not None:
            self.wait()
            held.refresh()
        return held

    def state_for(
        self,
        device: torch.device,
        rows: int,
        columns: int,
        cache: PagedCache,
        vocabulary: int,
        route: tuple[torch.device, ...] = (),
    ) -> DeviceState:
        """Static tensors for a call of `rows` rows of up to `columns` pages.

        Args:
            device: where tokens are chosen.
            route: the devices that steps pass through before, if there are others.
        """
        # Not before: it imports Triton.
        from hf_fastattn.loop.device_state import DeviceState

        elsewhere = tuple(place for place in dict.fromkeys(route) if place != device)
        size = (device, rows, columns, cache.tables, vocabulary, elsewhere)
        if self.state is None or not self.state.fits(*size):
            before, copies, stacks, row_states = self.state, self.copies, self._stacks, self.row_states
            self.drop()
            # The call under way has just made the copies and the stacks.
            self.copies, self._stacks, self.row_states = copies, stacks, row_states
            if before is not None:
                # At least as large as before, so that calls of two sizes do not replace each other's tensors.
                size = (device, max(rows, before.rows), max(columns, before.columns), cache.tables, vocabulary, elsewhere)
            self.state = DeviceState(*size)
            self.readback, self.workspace = Readback(self.state.rows, device), Workspace(device)
            self._workspaces = {place: Workspace(place) for place in elsewhere}
        self._route = (*route, device)
        # The last steps of the call before may be under way on another stream.
        self.wait()
        return self.state

    def ahead(self, launch: Callable[[], None]) -> None:
        """Launch what comes before a step's first graph."""
        recording = getattr(self._pool, "recording", None)
        if recording is None:
            launch()
        else:
            recording.ahead(launch)

    def row_states_for(self, cache: PagedCache, rows: int, moves: bool) -> RowStates:
        """Slots for the states that the layers of a cache hold, taken out of it, for steps of up to `rows` rows.

        Args:
            moves: rows go on as others.
        """
        layers, slots = cache.recurrent_layers, 2 * rows if moves else rows
        if self.row_states is None or not self.row_states.fits(layers, slots):
            count = 0 if self.row_states is None else self.row_states.count
            # What graphs read, and the memory of it, goes before there is more.
            self._entries.clear()
            self.row_states = None
            self.row_states = RowStates(layers, max(slots, count))
        self.row_states.load(layers, cache.lengths, moves)
        return self.row_states

    def has(self, key: GraphKey, storage_version: int) -> bool:
        """Whether the step is captured already."""
        held = self._entries.get(key)
        return held is not None and held.storage_version == storage_version

    def has_failed(self, key: GraphKey) -> bool:
        """Whether the step could not be captured."""
        return key in self._failed

    def replay(self, key: GraphKey, groups: PageGroups, run: Callable[[], Tensor], counters: CallCounters) -> Tensor:
        """One step: its graph, captured if need be, or its launches if that fails.

        Args:
            run: the launches; changes the state and returns its `packed`.

        Returns:
            `[rows]` int64, which the next step writes to.
        """
        if self.ranks is not None:
            self.ranks.count_step()
        if not self.has(key, groups.storage_version) and key not in self._failed:
            self._capture(key, groups, run, counters)
        held = self._entries.get(key)
        if held is None:
            with torch.inference_mode(False), torch.no_grad():
                return run()
        self._entries.move_to_end(key)
        counters.graphs_replayed += 1
        return held.recorded.replay(run, copy=False)

    def _capture(self, key: GraphKey, groups: PageGroups, run: Callable[[], Tensor], counters: CallCounters) -> None:
        assert self.state is not None
        self._entries.pop(key, None)
        route = tuple(dict.fromkeys(self._route))
        step = self.new_staged_forward(route) if len(route) > 1 else self.new_forward(self.state.device)
        restore_state = self.state.snapshot(key.beams)
        restore_rows = None if self.row_states is None else self.row_states.hold_back()

        def restore() -> None:
            restore_state()
            if restore_rows is not None:
                restore_rows()

        def recorded() -> Tensor:
            # What a graph computes must be ordinary tensors, whatever mode the caller is in.
            with torch.inference_mode(False), torch.no_grad():
                return run()

        warmed_up, failure = False, None

        def restore_after_first() -> None:
            nonlocal warmed_up
            warmed_up = True
            restore()

        try:
            step.capture(recorded, restore_after_first)
        except Exception as raised:
            restore()
            failure = raised
        error = self.agreed(failure, warmed_up)
        if error is not None:
            # The step then runs launch by launch; if the cause was not the capture, it fails there.
            self._failed.add(key)
            self.count_reason(f"capturing it failed with {type(error).__name__}: {error}", counters)
            return
        self.keep(key, RecordedStep(step, groups.storage_version), MAX_GRAPHS)
        counters.graphs_captured += 1
