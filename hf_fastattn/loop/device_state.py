"""`DeviceState`: what the fast decode loop keeps on the device, in tensors that stay where they are from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.mixed_batch import MixedBatch
from hf_fastattn.cache.prefix_groups import PrefixGroups
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.sampling.fork import ForkTensors
from hf_fastattn.kernels.sampling.loop_tensors import ABSENT, MOST_ENDS, LoopTensors
from hf_fastattn.kernels.sampling.params import PARAMS, SamplingParams
from hf_fastattn.loop.beam_state import BeamShape, BeamState
from hf_fastattn.loop.forced_state import ForcedState
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.piece_inputs import PieceInputs
from hf_fastattn.loop.processor_state import ProcessorState
from hf_fastattn.loop.request import LoopRequest
from hf_fastattn.loop.step_inputs import StepInputs, write

# Smallest allocation: a larger batch or longer rows need new tensors, and graphs over the old ones are dropped.
MIN_ROWS, MIN_COLUMNS = 64, 1024
# Graphs are captured for these numbers of rows, and for multiples of the last.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
# Shapes of beam searches whose tensors are kept, beside those that graphs refer to.
MAX_BEAMS = 4


def bucket_of(rows: int) -> int:
    """The bucket that `rows` rows are padded to."""
    last = BUCKETS[-1]
    return next((bucket for bucket in BUCKETS if bucket >= rows), -(-rows // last) * last)


def columns_for(columns: int) -> int:
    """Columns of the page tables that steps read, if no row has more pages than `columns`."""
    return max(power_of_2(columns), MIN_COLUMNS)


class DeviceState:
    """Static tensors for up to `rows` rows; a bucket's step works on the first rows of each.

    Args:
        device: of the model, or of its output layer.
        rows: there is room for.
        columns: of the page tables.
        windows: attention windows of the model.
        vocabulary: size of the logits.
        elsewhere: other devices that layers are on.
    """

    def __init__(
        self,
        device: torch.device,
        rows: int,
        columns: int,
        windows: Iterable[int | None],
        vocabulary: int,
        elsewhere: Sequence[torch.device] = (),
    ) -> None:
        self.device, self.windows, self.vocabulary = device, tuple(windows), vocabulary
        self.rows, self.columns = max(power_of_2(rows), MIN_ROWS), columns_for(columns)
        rows = self.rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            places = (device, *elsewhere)
            # What layers read, on each of the devices; steps change that of the first.
            self.inputs = {place: StepInputs(place, rows, self.columns, self.windows) for place in places}
            inputs = self.inputs[device]
            self._all = LoopTensors(
                chosen=zeros(rows, dtype=torch.int64),
                packed=zeros(rows, dtype=torch.int64),
                tokens=inputs.tokens,
                positions=inputs.positions,
                finished=inputs.by_row[0],
                limits=zeros(rows),
                seq_lens=inputs.seq_lens,
                slots=inputs.slots,
                tables=inputs.tables,
                step=zeros(1),
                ends=zeros(MOST_ENDS, dtype=torch.int64),
                pad=zeros(1, dtype=torch.int64),
                drop=zeros(1),
            )
            # The row's number in the call: random numbers depend on it, not on the row's index on the device.
            self.by_row = inputs.by_row
            self.numbers = inputs.by_row[2]
            # Of the row's adapter among those that rows choose from, -1 for none; 0 where none are chosen.
            self.adapters = zeros(rows)
            self.params = zeros(PARAMS, dtype=torch.float32)
            # Of rows that draw by parameters of their own, and logarithms of the probabilities that tokens were chosen with.
            self.own_params, self.logprobs = zeros(rows, PARAMS, dtype=torch.float32), zeros(rows, dtype=torch.float32)
            # Those of a draw from scores that filters have been applied to, and the least scores that these kept.
            self.no_filters = SamplingParams().tensor(device)
            self.thresholds = zeros(rows, dtype=torch.float32)
            self.seed = zeros(1, dtype=torch.int64)
            # Steps change page tables, since rows let tokens go.
            self.slides = False
            self.suppressed = zeros(MOST_ENDS, dtype=torch.int64)
            self._seen: Tensor | None = None
            self._own: Tensor | None = None
            self._beams: OrderedDict[BeamShape, BeamState] = OrderedDict()
            self.processors = ProcessorState(device, rows, vocabulary)
        self._forced: ForcedState | None = None
        self._pieces: PieceInputs | None = None

    def fits(
        self,
        device: torch.device,
        rows: int,
        columns: int,
        windows: Iterable[int | None],
        vocabulary: int,
        elsewhere: Sequence[torch.device] = (),
    ) -> bool:
        """Whether a call of this size has room."""
        same = (device, tuple(windows), vocabulary) == (self.device, self.windows, self.vocabulary)
        same &= (device, *elsewhere) == tuple(self.inputs)
        return same and rows <= self.rows and columns <= self.columns

    # ---- the first rows of each tensor ------------------------------------------------------------------------

    def tensors(self, rows: int, with_seen: bool) -> LoopTensors:
        """Views of the first `rows` rows."""
        held = self._all
        views = {
            name: getattr(held, name)[:rows]
            for name in ("chosen", "packed", "tokens", "positions", "finished", "limits", "seq_lens")
        }
        return replace(held, **views, slots=held.slots, seen=self.seen(rows) if with_seen else None)

    def seen(self, rows: int) -> Tensor:
        """`[rows, V]` uint8: which tokens a row holds, for a repetition penalty."""
        if self._seen is None:
            with torch.inference_mode(False):
                self._seen = torch.zeros(self.rows, self.vocabulary, dtype=torch.uint8, device=self.device)
        return self._seen[:rows]

    def beams(self, shape: BeamShape, page_tensors: int) -> BeamState:
        """The tensors of a beam search of this shape, the same as long as it is among the latest ones."""
        if shape not in self._beams:
            self._beams[shape] = BeamState(shape, self.device, len(self.windows), page_tensors)
            if len(self._beams) > MAX_BEAMS:
                self._beams.popitem(last=False)
        self._beams.move_to_end(shape)
        return self._beams[shape]

    def fork_tensors(self, state: BeamState, pages: Callable[[], Any], page_size: int) -> ForkTensors:
        """What lets the rows of a beam search go on as others."""
        held = self._all
        return ForkTensors(
            state.parents, held.tables, self.own_tables, held.seq_lens, state.live,
            state.moves, state.places, pages, state.shape.beams, page_size,
        )  # fmt: skip

    def arguments(self, rows: int, place: torch.device | None = None) -> dict[str, Any]:
        """The arguments of the decoder's forward, which begins on the device `place`, or on the only one."""
        inputs = self.inputs[self.device if place is None else place]
        return {
            "input_ids": inputs.tokens[:rows],
            "inputs_embeds": None,
            "position_ids": inputs.positions[:rows],
            "attention_mask": inputs.mask,
        }

    def batch(
        self, key: GraphKey, backend: str, batch_invariant: bool, workspace: Workspace, place: torch.device | None = None
    ) -> Batch:
        """A batch of one new token a row, and of the key's pieces of prompts, whose tensors are these: on the device
        `place`, or on the only one."""
        options = BatchOptions(backend, batch_invariant, workspace=workspace)
        inputs = self.inputs[self.device if place is None else place]
        steps = inputs.batch(key, options)
        if not key.pieces:
            return steps
        return MixedBatch.of(steps, self.pieces.batch(key.pieces, inputs.tables, options), self.device)

    @property
    def pieces(self) -> PieceInputs:
        """Of prompts that steps compute beside their rows."""
        if self._pieces is None:
            self._pieces = PieceInputs(self.device, self.windows)
        return self._pieces

    def follow(self) -> None:
        """Have layers elsewhere read what the step before has left; nobody waits on the host."""
        for place, inputs in self.inputs.items():
            if place != self.device:
                inputs.follow(self.inputs[self.device])

    # ---- what the host writes ---------------------------------------------------------------------------------

    def begin(
        self, request: LoopRequest, seq_lens: Sequence[int], positions: Tensor, limits: Sequence[int], drop: bool,
        adapters: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """A call starts, with nothing in flight.

        Args:
            seq_lens: keys a row before its first new token.
            positions: `[B, 1]` of the first new token.
            limits: new tokens a row.
            drop: rows that have finished leave the attention.
            adapters: the numbers of the rows' adapters, if rows choose theirs.
        """
        held, rows, used = self._all, len(seq_lens), bucket_of(len(seq_lens))
        write(held.seq_lens, [*seq_lens, *[0] * (used - rows)])
        write(held.finished, [0] * rows + [ABSENT] * (used - rows))
        write(held.limits, [*limits, *[0] * (used - rows)])
        write(self.numbers, list(range(used)))
        write(self.adapters, [*adapters, *[-1] * (used - rows)] if adapters else [0] * used)
        write(held.ends, [*request.ends, *[-1] * (MOST_ENDS - len(request.ends))])
        write(self.suppressed, [*request.suppressed, *[-1] * (MOST_ENDS - len(request.suppressed))])
        write(held.pad, [request.pad])
        write(held.drop, [int(drop)])
        write(self.params, request.choice.values())
        if request.do_sample:
            self.seed.copy_(torch.randint(2**62, (1,)), non_blocking=True)
        # advance() after the first choice adds one to both.
        held.positions[:rows].copy_(positions - 1)
        held.positions[rows:used].zero_()
        held.step.zero_()

    def force(self, tokens: Tensor) -> int:
        """Rows take these tokens `[B, N]`, on the host; returns the columns of what steps read."""
        if self._forced is None or self._forced.columns < tokens.shape[1]:
            self._forced = ForcedState(self.device, self.rows, tokens.shape[1])
        self._forced.write(tokens)
        return self._forced.columns

    @property
    def forced(self) -> ForcedState:
        """Of a call that forces tokens."""
        assert self._forced is not None
        return self._forced

    def see(self, input_ids: Tensor, ignored: int | Tensor) -> None:
        """Note the tokens of the prompt `[B, S]`, but for the first `ignored` of a row."""
        seen = self.seen(bucket_of(input_ids.shape[0])).zero_()
        columns = torch.arange(input_ids.shape[1], device=self.device)
        leading = ignored.to(self.device)[:, None] if isinstance(ignored, Tensor) else ignored
        counted = (columns[None] >= leading).expand(input_ids.shape).to(torch.uint8)
        seen[: input_ids.shape[0]].scatter_reduce_(1, input_ids.to(self.device), counted, "amax")

    @property
    def own_tables(self) -> Tensor:
        """`[W, rows, columns]` int32: where rows go on as others, the pages that each has for itself."""
        if self._own is None:
            with torch.inference_mode(False):
                self._own = torch.zeros_like(self._all.tables)
        return self._own

    def write_tables(self, tables: Sequence[NDArray[np.int32]], own: bool = False) -> None:
        """Upload `[B, columns]` page tables by window, those that steps read or those of `own_tables`."""
        for inputs in self.inputs.values():
            inputs.write_tables(tables, self.own_tables if own else inputs.tables)

    def write_groups(self, key: GraphKey, shared: PrefixGroups) -> None:
        """Write the prefix groups of a step with sharers."""
        for inputs in self.inputs.values():
            inputs.write_groups(key, shared)

    def keep(self, kept: Sequence[int], used: int, tables: bool = False) -> None:
        """Row b becomes row `kept[b]`, with `tables` its page table too; the others up to `used` rows take no part."""
        held, count = self._all, len(kept)
        index = torch.tensor(kept).to(self.device, non_blocking=True)
        moved = [held.chosen, held.tokens, held.positions, held.finished, held.limits, held.seq_lens, self.numbers]
        moved.append(self.adapters)
        for tensor in moved if self._seen is None else [*moved, self._seen]:
            tensor[:count] = tensor.index_select(0, index)
        self.processors.keep(index)
        held.slots[:, :count] = held.slots.index_select(1, index)
        if tables:
            held.tables[:, :count] = held.tables.index_select(1, index)
        held.finished[count:used].fill_(ABSENT)
        held.seq_lens[count:used].zero_()
        held.slots[:, count:used].fill_(-1)

    def finish_rows(self, rows: Sequence[int], drop: bool) -> None:
        """These rows have finished by a stop string, of which the device does not know."""
        held, index = self._all, torch.tensor(rows).to(self.device, non_blocking=True)
        held.finished.index_fill_(0, index, 1)
        if drop:
            # Their pages are released and may soon belong to another row.
            held.seq_lens.index_fill_(0, index, 0)
            held.slots.index_fill_(1, index, -1)

    def snapshot(self, beams: BeamState | None = None) -> Callable[[], None]:
        """A function that puts back what a step changes, of a search over `beams` if there is one; that holds pages back."""
        held = self._all
        changing = [held.chosen, held.tokens, held.positions, held.finished, held.seq_lens, held.slots, held.step]
        changing += [] if self._seen is None else [self._seen]
        changing += [held.tables] if self.slides and beams is None else []
        changing += [] if beams is None else [held.tables, *beams.changing()]
        before = [tensor.clone() for tensor in changing]
        if beams is not None:
            beams.live.zero_()

        def restore() -> None:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)

        return restore
