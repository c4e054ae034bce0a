"""Captured steps without a GPU: the same launches over the same static tensors, run again instead of replayed.

What is left out is the recording itself, and kernels: attention, norms, products and the choice of tokens are PyTorch's.
All else is what runs on a GPU: the host's part of the loop, page tables, slots, lengths, forks, prefix groups, compaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from hf_fastattn.autocast import autocast_as, forward_dtype
from hf_fastattn.cache.batch import Batch, SharedPrefixes
from hf_fastattn.cache.mixed_batch import MixedBatch
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.forward_entry import Entry
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.graphs.static_inputs import StaticInputs
from hf_fastattn.kernels.attention import reference, rope_reference
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.sampling import advance_reference, continuations_reference, fork_reference, slide_reference
from hf_fastattn.kernels.sampling import reference as sampling_reference
from hf_fastattn.kernels.sampling.params import PARAMS, SamplingParams
from hf_fastattn.kernels.variants.prepared import PreparedVariant
from hf_fastattn.loop.decode_loop import DecodeLoop
from hf_fastattn.loop.device_state import DeviceState
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.loop_graphs import LoopGraphs


class ReexecutedStep(RecordedForward):
    """A step whose replay runs the forward. Its output lies in one tensor, as that of a graph."""

    devices = ("cpu", "cuda")
    backends = ("reference", "triton", "hopper")

    @staticmethod
    def make_pool(device: torch.device) -> Any:
        return SimpleNamespace(nbytes=0)

    @staticmethod
    def enter(room: Any) -> None:
        pass

    def capture(self, run: Callable[[], Tensor], warmed_up: Callable[[], None]) -> None:
        # Neither the first run nor recording moves the generator.
        with torch.random.fork_rng(devices=[]):
            run()
            warmed_up()
            self._output = run()

    def capture_running(self, run: Callable[[], Tensor]) -> Tensor:
        """As `StagedForward`'s: there is no first run."""
        self._output = run()
        return self._output.clone()

    def capture_launched(self, run: Callable[[], Tensor], launched: Callable[[], None]) -> Tensor:
        """As `StagedForward`'s: the first run counts."""
        out = run()
        launched()
        self._output = run()
        return out

    def replay(self, run: Callable[[], Tensor], copy: bool = True) -> Tensor:
        assert self._output is not None
        with torch.inference_mode(False), torch.no_grad():
            self._output.copy_(run())
        return self._output.clone() if copy else self._output


class ReadBack(Batch):
    """A static batch for the reference backend, which wants lists, and rows and tokens that are there."""

    def rope_append(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
        window: int | None, **norms: Any,
    ) -> Tensor:  # fmt: skip
        slots = self.on(q.device).slots[window].long()
        there = slots >= 0
        out = torch.zeros_like(q)
        out[there] = rope_reference.rope_append(
            q[there], k[there], v[there], cos[there], sin[there], k_pages, v_pages, slots[there], **norms
        )
        return out

    def _is_short_row(self, *_: Any) -> bool:
        return False

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, *, scale: float,
        variant: PreparedVariant | None = None,
    ) -> Tensor:  # fmt: skip
        size, held_tensors = k_pages.shape[1], self.on(q.device)
        lengths = held_tensors.seq_lens
        there = lengths > 0
        table = held_tensors.page_tables[window]
        if self.shared is not None and window is None:
            table = through_first_rows(table, lengths, self.shared, size)
        begins = held_tensors.cu_seqlens
        news = torch.ones_like(lengths) if begins is None else begins.diff()
        if variant is not None:
            # All rows, since a variant may read their numbers.
            pages = [row[: -(-length // size)] for row, length in zip(table.tolist(), lengths.tolist(), strict=True)]
            plan = ReadPlan(pages, news.tolist(), lengths.tolist(), size, window)
            return variant_attention(q, k_pages, v_pages, plan, variant.variant, scale=scale)[0]
        held = lengths[there].tolist()
        # A row without keys has zeros.
        queries = there.repeat_interleave(news)
        pages = [row[: -(-length // size)] for row, length in zip(table[there].tolist(), held, strict=True)]
        plan = ReadPlan(pages, news[there].tolist(), held, size, window)
        out = torch.zeros_like(q)
        if held:
            out[queries] = reference.paged_attention(q[queries], k_pages, v_pages, plan, scale=scale)[0]
        return out


def _read_back(batch: Batch) -> Batch:
    if not isinstance(batch, MixedBatch):
        return ReadBack(**vars(batch))
    steps, pieces, whole = map(_read_back, (batch.steps, batch.pieces, batch.whole))
    return replace(batch, steps=steps, pieces=pieces, whole=whole)


def through_first_rows(table: Tensor, lengths: Tensor, shared: SharedPrefixes, page_size: int) -> Tensor:
    """`[B, columns]` pages as shared_prefix.py reads them: a prefix by those of its first row with keys."""
    table = table.clone()
    above = torch.zeros(len(table), dtype=torch.int64)
    for starts, lens in zip(shared.group_starts.tolist(), shared.prefix_lens.tolist(), strict=True):
        found = above.clone()
        for first, past, tokens in zip(starts, starts[1:], lens, strict=False):
            readers = [row for row in range(first, past) if lengths[row] > 0]
            if readers:
                begin, end = int(above[first]) // page_size, tokens // page_size
                table[first:past, begin:end] = table[readers[0], begin:end].clone()
                found[first:past] = found[first:past].clamp(min=tokens)
        above = found
    return table


class ReexecutedLoopStep(ReexecutedStep):
    """The same for whole steps, which change what they read: only replays count."""

    def capture(self, run: Callable[[], Tensor], warmed_up: Callable[[], None]) -> None:
        with torch.random.fork_rng(devices=[]):
            run()
            warmed_up()

    def replay(self, run: Callable[[], Tensor], copy: bool = True) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return run().clone() if copy else run()


@contextmanager
def reexecuted_loop() -> Iterator[None]:
    """The fast loop runs on the CPU too, and for the reference backend."""
    make, launch = DeviceState.batch, DecodeLoop._launch

    def launch_of_what_was_captured(self: DecodeLoop) -> None:
        held, model = self._graphs._fingerprint, self._model
        with autocast_as(model.device, forward_dtype(model)):
            now = fingerprint_of(model, model.device)
        # A graph would have gone on with the modules that it was captured with; parts of variants come last.
        assert held is not None and held.parts[: len(now.parts)] == now.parts and not now.hooked
        launch(self)

    def batch(
        self: DeviceState, kind: GraphKey, backend: str, batch_invariant: bool, workspace: Any, place: Any = None
    ) -> Batch:
        made = make(self, kind, backend, batch_invariant, workspace, place)
        return made if backend in ("triton", "hopper") else _read_back(made)

    with ExitStack() as stack, reexecuted():
        stack.enter_context(mock.patch.object(LoopGraphs, "forward_type", ReexecutedLoopStep))
        stack.enter_context(mock.patch.object(LoopGraphs, "staged_type", ReexecutedLoopStep))
        stack.enter_context(mock.patch.object(DeviceState, "batch", batch))
        stack.enter_context(mock.patch.object(DecodeLoop, "_launch", launch_of_what_was_captured))
        for name, function in () if knobs.runtime.interpret else IN_TORCH:
            stack.enter_context(mock.patch(f"hf_fastattn.{name}", function))
        yield


def choose_in_torch(
    logits: Tensor, out_tokens: Tensor, params: Any = None, seed: Any = None, rows: Any = None, step: Any = None,
    thresholds: Any = None,
) -> None:  # fmt: skip
    """`kernels.sampling.draw.choose_tokens`: other draws, but of the same distribution, and of seed, row and step alone."""
    if params is None:
        out_tokens.copy_(sampling_reference.greedy_tokens(logits))
        return
    held = params if params.ndim == 2 else SamplingParams(*_values(params))
    if thresholds is not None:
        scores = sampling_reference.scaled(logits, params.view(-1, PARAMS)[:, :1]).float()
        thresholds.copy_(scores.masked_fill(~sampling_reference.kept_tokens(logits, held), float("inf")).amin(-1))
    likely = sampling_reference.probabilities(logits, held)
    for row, number in enumerate(rows.tolist()):
        generator = torch.Generator().manual_seed(hash((int(seed), number, int(step))) % 2**62)
        out_tokens[row] = torch.multinomial(likely[row], 1, generator=generator)[0]


def logprobs_in_torch(
    logits: Tensor, tokens: Tensor, out: Tensor, params: Tensor | None = None, thresholds: Tensor | None = None
) -> None:
    """`kernels.sampling.logprobs.token_logprobs`."""
    held = None if params is None else params.view(-1, PARAMS)
    out.copy_(sampling_reference.token_logprobs(logits, tokens, held))


def process_in_torch(logits: Tensor, params: Tensor, seen: Any = None, eos: Any = None, step: Any = None) -> Tensor:
    """`kernels.sampling.penalty.process_logits`."""
    ends = [] if eos is None else [end for end in eos.tolist() if end >= 0]
    return sampling_reference.process_logits(
        logits, SamplingParams(*_values(params)), seen, ends, 0 if step is None else int(step)
    )


def _values(params: Tensor) -> list[Any]:
    values: list[Any] = params.tolist()
    return [int(value) if place in (1, 5) else value for place, value in enumerate(values)]


@contextmanager
def reexecuted() -> Iterator[None]:
    """Steps are captured on the CPU too, and for the reference backend."""
    make, launcher = StaticInputs.batch, Entry.launcher

    def batch(self: StaticInputs, backend: str, batch_invariant: bool, workspace: Any) -> Batch:
        made = make(self, backend, batch_invariant, workspace)
        if backend in ("triton", "hopper"):
            return made
        return ReadBack(**vars(made))

    def launcher_of_what_was_captured(self: Entry, decoder: Any, forward: Any, cache: PagedCache) -> Callable[[], Tensor]:
        run = launcher(self, decoder, forward, cache)

        def checked() -> Tensor:
            out = run()
            # A graph would have gone on with the pages, and the modules, that it was captured with.
            assert self.storage_version in (-1, cache.groups.storage_version)
            now = fingerprint_of(decoder, self.inputs.shape.device)
            assert vars(self).setdefault("captured_with", now) == now
            return out

        return checked

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ForwardGraphs, "forward_type", ReexecutedStep))
        stack.enter_context(mock.patch.object(ForwardGraphs, "staged_type", ReexecutedStep))
        stack.enter_context(mock.patch.object(Entry, "launcher", launcher_of_what_was_captured))
        stack.enter_context(mock.patch.object(StaticInputs, "batch", batch))
        yield


# Kernels that steps of the loop launch, where they are looked up, and the same in PyTorch.
IN_TORCH: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("loop.decode_loop.advance", advance_reference.advance),
    ("loop.decode_loop.slide", slide_reference.slide),
    ("batching.device_steps.advance", advance_reference.advance),
    ("loop.beam_loop.advance", advance_reference.advance),
    ("loop.beam_loop.fork", fork_reference.fork),
    ("loop.beam_step.continuations", continuations_reference.continuations),
    ("loop.token_choice.choose_tokens", choose_in_torch),
    ("loop.token_choice.token_logprobs", logprobs_in_torch),
    ("loop.token_choice.process_logits", process_in_torch),
    ("kernels.sampling.typical.typical_scores", sampling_reference.typical_scores),
)
