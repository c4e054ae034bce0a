"""`Engine`: requests join and leave a running batch, whose steps are launched without waiting for their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.batching.choice import Choice
from hf_fastattn.batching.pieces import Taken, may_wait, next_tokens, pieces_of
from hf_fastattn.batching.prompts import compute_pieces
from hf_fastattn.batching.requests import Request
from hf_fastattn.batching.running_batch import RunningBatch
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.loop.piece_inputs import MOST_PIECES
from hf_fastattn.pages.page_pool import CacheFullError

# Tokens of prompts computed between two steps: so many for each prompt, and at most.
PIECE, MOST_TOKENS = 192, 8192
# So many prompts are computed one by one, by recorded forwards of PIECE tokens.
FEW = 4
# Prompts come first if there is one for so many running rows.
BURST = 4
# Pieces of MOST_TOKENS that rows wait for at most.
MOST_WAITED = 8
# Times that memory may run out before a step succeeds.
MOST_FAILURES = 4


class Engine:
    """The running batch of one manager.

    Args:
        model: patched.
        pages: of the slots, all empty.
        slots: how many.
        make_steps: makes `DeviceSteps` or `HostSteps` for logits of a size.
        deliver: called with requests that are over, or have got tokens and are streamed.
        choice: how tokens are chosen.
        most_tokens: of prompts, computed at once.
        patient: requests come in groups, of which all are waited for: those that may get most tokens come first.
    """

    def __init__(
        self, model: Any, pages: SlotPages, slots: int, make_steps: Callable[[int], Any],
        deliver: Callable[[list[Request]], None], choice: Choice, most_tokens: int = MOST_TOKENS,
        patient: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._pages, self._make_steps, self._deliver = model, pages, make_steps, deliver
        # While requests are under way the model stays where it is.
        self._device = model.device
        self._choice, self._most_tokens = choice, most_tokens
        self._steps: Any = None
        self._batch = RunningBatch(pages, slots, choice.logprobs)
        # Requests that have arrived, and rounds of a patient engine.
        self._arrived, self._rounds, self._patient = 0, 0, patient
        # Of prompts, computed since the last step.
        self._pieces = 0
        # Times that memory ran out since the last step.
        self._failures = 0

    # ---- requests ---------------------------------------------------------------------------------------------

    def add(self, state: Any) -> None:
        """A request has arrived, with as many more of the same prompt as it asks for.

        Raises:
            ValueError: its parameters of a draw are out of their range.
        """
        params = self._choice.params_of(state.logit_processor_kwargs)
        first = Request.of(state, number := self._number(), params, group=self._rounds if self._patient else number)
        self._batch.wait(first)
        for child in range(state.num_children):
            twin = state.fork(f"{state.request_id}__child#{child}")
            self._batch.wait(Request.of(twin, self._number(), params, first, first.group))

    def _number(self) -> int:
        self._arrived += 1
        return self._arrived

    def cancel(self, names: Iterable[str]) -> None:
        """Requests of these names are not wanted any more; nothing is delivered for them."""
        wanted = set(names)
        if not wanted:
            # Asked in every round.
            return
        for request in self._batch.all():
            if request.state.request_id in wanted:
                request.is_over = True
                self._batch.remove(request)

    def fail_all(self, error: Exception) -> None:
        """No request gets another token."""
        for request in self._batch.all():
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        request.set_tokens(*self._batch.chosen(request))
        self._batch.remove(request)
        request.failed(error)
        self._deliver([request])

    @property
    def is_idle(self) -> bool:
        """No request is waiting or under way."""
        return self._batch.is_empty

    # ---- a round ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """One round: admit requests, compute pieces of prompts, launch a step, take what has arrived.

        Raises:
            torch.OutOfMemoryError: there is no memory, even for little at a time.
        """
        try:
            self._round()
            return
        except torch.OutOfMemoryError:
            self._failures += 1
            if self._failures > MOST_FAILURES:
                raise
        # Not while the error is handled, whose frames hold tensors.
        self._start_over()

    def _start_over(self) -> None:
        """Memory ran out: all requests wait again, and go on with fewer pages and shorter pieces."""
        if self._steps is not None:
            self._drain()
        for request in list(self._batch.by_slot.values()):
            self._batch.preempt(request)
        self._pages.give_up_memory()
        self._most_tokens = max(self._most_tokens // 2, PIECE)

    def _round(self) -> None:
        for request, error in self._batch.admit():
            self._fail(request, error)
        if self._steps is not None and not self._steps.is_current():
            self._restart(0)
        rows, prompts = self._batch.rows.count, len(self._batch.prompts)
        # Where many requests wait for their first token, they come first, for a while.
        burst = BURST * prompts > rows and (self._pieces < MOST_WAITED or not rows)
        self._pieces, self._rounds = self._pieces + 1, self._rounds + 1
        size = self._mixed_size(burst) if rows and prompts and self._steps.mixes else None
        if burst and size is None:
            self._compute(self._most_tokens)
        elif size is not None:
            # The step takes pieces of prompts in.
            pass
        elif prompts > FEW or (prompts and PIECE > self._most_tokens):
            self._compute(min(PIECE * prompts, self._most_tokens))
        else:
            # One by one, since they are recorded.
            for request in list(self._batch.prompts):
                self._append([(request, min(len(request.prompt) - request.done, PIECE))], PIECE)
        if self._batch.rows.count and not (burst and size is None and self._batch.prompts):
            self._launch(size)
        self._receive()

    def _mixed_size(self, burst: bool) -> tuple[int, int] | None:
        """Rows and tokens of prompts of a step of both; None if prompts are computed apart, as in a `burst`."""
        batch, steps = self._batch, self._steps
        if burst and not self._patient:
            return None
        used = int(batch.rows.slots[-1]) + 1
        pending = sum(len(request.prompt) - request.done for request in batch.prompts)
        found: tuple[int, int] | None = None
        if self._patient:
            found = steps.mixed_size(used, pending, True)
            found = found if found is not None and may_wait(batch, found[1]) else None
        return steps.mixed_size(used, pending) if found is None and not burst else found

    def _receive(self) -> None:
        """Take what has arrived, and wait where nothing can be launched before, or too much is under way."""
        steps, batch = self._steps, self._batch
        idle = not batch.prompts and not batch.rows.count
        while steps is not None and steps.under_way:
            if not self._take(idle or steps.under_way > steps.depth):
                return

    def settle(self) -> None:
        """Take all that is under way, and wait for the device: somebody else works with the model."""
        if self._steps is not None:
            self._drain()
            self._steps.settle()

    def close(self) -> None:
        """Nobody reads what is under way."""
        if self._steps is not None:
            self._steps.forget()
            self._steps.settle()

    def _wait(self) -> None:
        """Have room for one more step under way."""
        while self._steps.under_way > self._steps.depth:
            self._take(True)

    def _drain(self) -> None:
        while self._steps.under_way:
            self._take(True)

    def _take(self, wait: bool) -> bool:
        arrived, batch = self._steps.receive(wait), self._batch
        if arrived is None:
            return False
        started, ended, streamed = batch.tokens.take(*arrived)
        for place in started:
            batch.by_place[place].started()
        shown = self._finish(ended)
        if streamed:
            for place, token, logprob in zip(streamed, *batch.tokens.last(streamed), strict=True):
                request = batch.by_place[place]
                request.note_time()
                if request.state.streaming:
                    request.append(token, logprob)
                    shown.append(request)
        if shown:
            self._deliver(shown)
        return True

    def _finish(self, ended: Sequence[int]) -> list[Request]:
        """Requests whose last token has arrived."""
        batch, over = self._batch, []
        for place in ended:
            request = batch.by_place[place]
            request.set_tokens(*batch.chosen(request))
            request.note_time()
            request.finished()
            batch.remove(request)
            over.append(request)
        batch.counters.requests_batched += len(over)
        return over

    def record(self, rows: int, mixed: bool = False) -> None:
        """Record the step of so many rows, none of which takes part; and if it is to be, those with pieces of prompts."""
        self._write()
        self._steps.record(rows)
        if mixed:
            self._steps.record_mixed()

    # ---- prompts ----------------------------------------------------------------------------------------------

    def _compute(self, tokens: int) -> None:
        """Compute so many tokens of the prompts that came first, together."""
        self._append(next_tokens(self._batch.prompts, tokens))

    def _append(self, taken: Taken, size: int = 0) -> None:
        """Compute so many tokens of each of these prompts; where one ends, its first token is chosen."""
        ends = [place for place, (request, count) in enumerate(taken) if request.done + count == len(request.prompt)]
        logits = compute_pieces(
            self._model, self._pages, [request.slot for request, _ in taken], [request.done for request, _ in taken],
            [request.prompt[request.done : request.done + count] for request, count in taken], ends,
            self._device, size,
        )  # fmt: skip
        for request, count in taken:
            request.done += count
        if logits is not None:
            self._begin([taken[place][0] for place in ends], logits)
        self._release_behind()

    def _release_behind(self) -> None:
        if self._pages.has_windows:
            lengths = self._batch.rows.lengths.copy()
            for request in self._batch.prompts:
                lengths[request.slot] = request.done
            self._pages.release_behind(lengths)

    def _begin(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Choose the first tokens of requests whose prompts are computed."""
        batch = self._batch
        if self._steps is None:
            self._steps = self._make_steps(logits.shape[-1])
        self._make_columns(max(self._pages.columns(request.slot) for request in requests))
        steps, slots = self._steps, [request.slot for request in requests]
        self._wait()
        tickets = np.array([batch.start(request) for request in requests], np.int64)
        params = np.array([request.params.values() for request in requests])
        packed = steps.first(logits, [request.number for request in requests], params)
        steps.join(slots, packed)
        steps.send(packed, tickets)
        for request in requests:
            if request.limit <= 1:
                batch.vacate(request)

    def _make_columns(self, wanted: int) -> None:
        if wanted > self._steps.columns:
            self._restart(wanted)

    def _restart(self, columns: int) -> None:
        """The device's tensors are made anew, with room for longer rows, or since the model has changed."""
        self._drain()
        batch = self._batch
        alive = batch.rows.slots
        tokens = [batch.tokens.of(batch.by_slot[slot].place)[-1] for slot in alive.tolist()]
        self._steps.restart(columns, alive, np.array(tokens, np.int64))
        batch.rows.changed.update(alive.tolist())
        self._pages.all_changes(list(batch.by_slot))

    # ---- steps ------------------------------------------------------------------------------------------------

    def _launch(self, size: tuple[int, int] | None) -> None:
        """Launch a step of all rows that go on, with pieces of prompts if it has a `size` for these."""
        batch, rows = self._batch, self._batch.rows
        self._wait()
        self._reserve()
        taken = [] if size is None else next_tokens(batch.prompts[:MOST_PIECES], size[1])
        if taken:
            self._make_columns(max(self._pages.columns(request.slot) for request, _ in taken))
        if not rows.count:
            return
        bucket = self._bucket() if size is None or not taken else size[0]
        if not rows.count:
            return
        steps, slots = self._steps, rows.slots
        used = int(slots[-1]) + 1
        self._write()
        if size is not None and taken:
            packed = steps.launch_mixed(size, pieces_of(self._pages, taken))
        else:
            packed = steps.launch(bucket, slots, rows.lengths[slots])
        tickets = rows.tickets[:used].copy()
        batch.counters.batch_steps += 1
        self._pieces = self._failures = 0
        for slot in rows.step():
            batch.vacate(batch.by_slot[slot])
        if taken:
            tickets = np.concatenate((tickets, np.full((bucket - used, 2), -1), batch.advance(taken)))
        steps.send(packed[: len(tickets)], tickets)
        self._release_behind()

    def _write(self) -> None:
        """What the device has to know before its next step."""
        rows = self._batch.rows
        if rows.changed or self._pages.changes:
            changed = np.array(sorted(rows.changed), np.int64)
            rows.changed.clear()
            held = (rows.alive, rows.lengths, rows.numbers, rows.params)
            self._steps.write(changed, *(values[changed] for values in held))
        self._pages.cache.grow_tensors()

    def _bucket(self) -> int:
        """Rows of the next step; rows move to lower slots if that makes it smaller, and nobody is to come."""
        batch, rows = self._batch, self._batch.rows
        left, used = int(rows.left[rows.slots].max()), int(rows.slots[-1]) + 1
        bucket: int = self._steps.bucket(used, left)
        if batch.waiting or batch.prompts or rows.count == used or self._steps.bucket(rows.count, left) >= bucket:
            return bucket
        self._drain()
        if not rows.count:
            return bucket
        batch.compact(rows.count)
        self._restart(0)
        smaller: int = self._steps.bucket(int(rows.slots[-1]) + 1, left)
        return smaller

    def _reserve(self) -> None:
        """Pages for the next step; if there are none, the requests that came last start over when there are some."""
        batch, extended = self._batch, False
        while short := batch.rows.short():
            extended = True
            for slot in sorted(short, key=lambda one: batch.by_slot[one].turn):
                if slot not in batch.by_slot or not batch.rows.alive[slot]:
                    break
                if not batch.extend(slot):
                    self._make_room()
                    break
        if extended:
            longest = int(batch.rows.room.max(initial=0, where=batch.rows.alive))
            self._make_columns(longest // self._pages.page_size)

    def _make_room(self) -> None:
        """Take the youngest request out of the batch."""
        batch = self._batch
        self._drain()
        if not batch.by_slot:
            return
        request = batch.youngest()
        if len(batch.by_slot) > 1:
            batch.preempt(request)
        elif batch.rows.short() and not batch.extend(request.slot):
            most = self._pages.most or 0
            self._fail(request, CacheFullError(
                f"the request holds {int(batch.rows.lengths[request.slot])} tokens, and there are {most} pages of "
                f"{self._pages.page_size}: raise memory_limit, num_blocks or max_memory_percent"
            ))  # fmt: skip
