"""`DeviceSteps`: decode steps of a running batch, replayed over static tensors that the host changes row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.batching.choice import Choice
from hf_fastattn.batching.packed_tokens import Arrived, pack, tokens_of, unpack
from hf_fastattn.batching.row_tokens import UNLIMITED, Array
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.kernels.sampling.loop_tensors import ABSENT
from hf_fastattn.loop.device_state import BUCKETS, DeviceState, bucket_of
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.loop.piece_inputs import MOST_PIECES
from hf_fastattn.loop.readback import Readback
from hf_fastattn.loop.token_choice import choose, choose_first
from hf_fastattn.patches.fused.forward import fused_forward, step_logits

# Steps and prompts that may be under way when another one is launched.
DEPTH = 3
# Capture a graph for a smaller batch only if at least this many steps may still follow; a larger one serves until then.
WORTH_CAPTURING = 128
# Random numbers of a request's first token are those of another row, since a step may have the same number.
FIRST = 2**30


class DeviceSteps:
    """The device's part of a running batch.

    Args:
        model: patched; `graphs` are its own for batches.
        pages: of the slots.
        slots: how many there are.
        columns: pages that a slot may have.
        vocabulary: size of the logits.
        choice: how tokens are chosen.
        device: of the model.
    """

    depth = DEPTH
    # Pieces of prompts are computed apart.
    mixes = False

    def __init__(
        self, model: Any, graphs: LoopGraphs, pages: SlotPages, slots: int, columns: int, vocabulary: int, choice: Choice,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._model, self._graphs, self._pages, self._choice = model, graphs, pages, choice
        self._decoder = model._fastattn.decoder(model)
        self._size = (slots, vocabulary)
        self._device = device
        seed = torch.randint(2**62, (1,)) if choice.seed is None else torch.tensor([choice.seed])
        self._seed = seed.to(device)
        self._start(columns)
        # With a seed, the same requests draw the same tokens, whatever ran before.
        self._held.step.zero_()
        # A step with pieces of prompts may have more rows than there are slots.
        self._readback = Readback(self._state.rows + MOST_PIECES, device, DEPTH)

    def _start(self, columns: int) -> None:
        slots, vocabulary = self._size
        self._state: DeviceState = self._graphs.state_for(
            self._device, bucket_of(slots), columns, self._pages.cache, vocabulary
        )
        # Of all slots: views of them take a while to make.
        held = self._held = self._state.tensors(self._state.rows, False)
        held.finished.fill_(ABSENT)
        held.limits.fill_(UNLIMITED)
        held.ends.fill_(-1)
        held.slots.fill_(-1)
        held.drop.fill_(1)
        for tensor in (held.seq_lens, held.tokens, held.positions, held.chosen, held.pad):
            tensor.zero_()
        shared = self._choice.params.tensor(self._device)
        self._state.params.copy_(shared)
        self._state.own_params.copy_(shared)
        self._state.seed.copy_(self._seed)
        self._state.adapters.zero_()

    @property
    def columns(self) -> int:
        """Pages that a slot may have."""
        return self._state.columns

    def restart(self, columns: int, slots: Array, tokens: Array) -> None:
        """Anew, with nothing under way, with room for more pages a slot: `write` tells it of every slot.

        Args:
            slots: those that are alive, and `tokens` that they have chosen last.
        """
        step = self._held.step.clone()
        self._start(max(columns, self.columns))
        # Random numbers of earlier steps do not come again.
        self._held.step.copy_(step)
        self.join(slots.tolist(), torch.from_numpy(tokens).to(self._device))

    def is_current(self) -> bool:
        """Whether the static tensors are still those of the graphs; not if the model was changed."""
        return self._graphs.state is self._state

    # ---- tokens -----------------------------------------------------------------------------------------------

    def first(self, logits: Tensor, numbers: Sequence[int], params: NDArray[np.float64]) -> Tensor:
        """The tokens `[n]`, packed, that follow prompts with `logits [n, V]` and are drawn by `params [n, PARAMS]`."""
        numbers_held = torch.tensor([number % FIRST + FIRST for number in numbers], dtype=torch.int32)
        rows, key = numbers_held.to(self._device, non_blocking=True), self._key(1)
        held = self._state.params if key.do_sample else None
        if key.own_params:
            held = torch.from_numpy(params).float().to(self._device, non_blocking=True)
        logprobs = torch.empty(len(logits), device=self._device) if key.logprobs else None
        return pack(choose_first(self._state, logits, rows, held, logprobs), logprobs)

    def join(self, slots: Sequence[int], packed: Tensor) -> None:
        """These slots' next input is `packed [n]`."""
        index = torch.tensor(slots, dtype=torch.int64).to(self._device, non_blocking=True)
        self._held.tokens[:, 0].index_copy_(0, index, tokens_of(packed))

    def send(self, packed: Tensor, tickets: Array) -> None:
        """Start the copy of what was chosen; `tickets` say for whom."""
        self._readback.send(packed, tickets)  # type: ignore[arg-type]

    def receive(self, wait: bool) -> Arrived | None:
        """Tickets, tokens and logprobs of the oldest step under way; None if there is none, or it has not arrived."""
        arrived = self._readback.take(wait)
        return None if arrived is None else (arrived[1], *unpack(arrived[0], self._choice.logprobs))  # type: ignore[return-value]

    @property
    def under_way(self) -> int:
        """Steps and prompts whose tokens have not arrived."""
        return len(self._readback)

    def forget(self) -> None:
        """Nobody reads what is under way."""
        self._readback.clear()

    def settle(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    # ---- rows -------------------------------------------------------------------------------------------------

    def write(
        self, slots: Array, alive: NDArray[np.bool_], lengths: Array, numbers: Array, params: NDArray[np.float64]
    ) -> None:
        """What the host knows better of these slots.

        Args:
            alive: whether each takes part in steps.
            lengths: tokens stored of each.
            numbers: of their requests.
            params: `[n, PARAMS]` of their draws.
        """
        count, windows, changes = len(slots), len(self._pages.cache.tables), self._pages.changes
        if not count and not changes:
            return
        host = np.full((5 + windows, count), -1, np.int64)
        host[0], host[1] = slots, np.where(alive, lengths, 0)
        # As `by_row` has them.
        host[2], host[3], host[4] = np.where(alive, 0, ABSENT), np.where(alive, lengths + 1, 0), numbers % FIRST
        for place in np.flatnonzero(alive).tolist():
            host[5:, place] = self._pages.place_of(int(slots[place]), int(lengths[place]))
        # One copy for all.
        flat = np.concatenate((host.ravel(), *self._table_entries()))
        device = torch.from_numpy(flat).to(self._device, non_blocking=True)
        narrow, size = device.int(), host.size
        if count:
            self._held.positions[:, 0].index_copy_(0, device[:count], device[count : 2 * count])
            self._state.by_row.index_copy_(1, device[:count], narrow[2 * count : size].view(-1, count))
            if self._key(1).own_params:
                own = torch.from_numpy(params).float().to(self._device, non_blocking=True)
                self._state.own_params.index_copy_(0, device[:count], own)
        if changes:
            places, pages = device[size:].view(2, -1)[0], narrow[size:].view(2, -1)[1]
            self._held.tables.view(-1).index_copy_(0, places, pages)
            changes.clear()

    def _table_entries(self) -> list[Array]:
        """Entries of the page tables that have changed: where they are, and then what."""
        _, rows, columns = self._held.tables.shape
        changes = self._pages.changes
        places = [np.arange(len(pages)) + (place * rows + slot) * columns + first for place, slot, first, pages in changes]
        return [*places, *(np.asarray(pages, np.int64) for *_, pages in changes)]

    # ---- steps ------------------------------------------------------------------------------------------------

    def bucket(self, used: int, steps: int) -> int:
        """Rows of the step for the first `used` slots, after which about `steps` more follow."""
        wanted, version = bucket_of(used), self._pages.cache.groups.storage_version
        if self._graphs.has(self._key(wanted), version) or steps >= WORTH_CAPTURING:
            return wanted
        larger = [rows for rows in self._buckets() if rows > wanted and self._graphs.has(self._key(rows), version)]
        return larger[0] if larger and larger[0] <= 4 * wanted else wanted

    def _buckets(self) -> list[int]:
        return [*BUCKETS, *range(2 * BUCKETS[-1], self._state.rows + 1, BUCKETS[-1])]

    def _key(self, rows: int, pieces: int = 0) -> GraphKey:
        return self._choice.graph_key(rows, pieces)

    def record(self, rows: int) -> None:
        """Record the step of `rows` slots, none of which takes part in any."""
        none = np.zeros(0, np.int64)
        self.launch(bucket_of(rows), none, none)

    def launch(self, rows: int, slots: Array, lengths: Array) -> Tensor:
        """One step of the first `rows` slots; returns their tokens, packed, which the next step writes to."""
        key, cache = self._key(rows), self._pages.cache
        return self._graphs.replay(key, cache.groups, lambda: self._run(key), self._pages.counters)

    def _run(self, key: GraphKey) -> Tensor:
        state, cache, workspace = self._state, self._pages.cache, self._graphs.workspace
        assert workspace is not None
        batch = state.batch(key, cache.groups.backend, cache.groups.batch_invariant, workspace)
        with cache.using(batch):
            arguments = {**state.arguments(key.rows), "use_cache": True, "return_dict": True}
            hidden = fused_forward(self._decoder, cache, **arguments).last_hidden_state
        batch.forget_tables()
        return self._go_on(key, step_logits(self._model, hidden.flatten(0, 1)))

    def _go_on(self, key: GraphKey, logits: Tensor) -> Tensor:
        """Choose tokens by `logits [rows, V]`, and have them be the next step's input; returns them packed."""
        state = self._state
        choose(state, key, logits)
        tensors = state.tensors(key.rows, False)
        advance(tensors, self._pages.cache.groups.page_size)
        if key.logprobs:
            # Which rows have finished the host knows.
            tensors.packed.copy_(pack(tensors.chosen, state.logprobs[: key.rows]))
        return tensors.packed
