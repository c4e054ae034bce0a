"""`Request`: one request of a manager, from its arrival to its last token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.generation.continuous_batching.requests import RequestStatus

from hf_fastattn.batching.row_tokens import UNLIMITED
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.pages.prefix_index import RowTokens


@dataclass(eq=False)
class Request:
    """A request on its way.

    Attributes:
        state: Transformers' own, which becomes the output.
        number: of its arrival.
        group: of requests that arrived together; a lower one comes first.
        prompt: `[n]` tokens to compute before the next one is chosen: after a preemption also those chosen before.
        params: by which its tokens are drawn.
        after: a request with the same prompt, whose pages this one waits for.
        done: tokens of the prompt that are computed.
        slot: in the running batch; -1 outside of it.
        place: of its tokens; -1 outside of the running batch.
        found: pages of the index that its prompt began with.
        is_over: its output was delivered, or it was cancelled.
    """

    state: Any
    number: int
    prompt: NDArray[np.int64]
    params: SamplingParams
    after: Request | None = None
    group: int = 0
    done: int = 0
    slot: int = -1
    place: int = -1
    found: Sequence[int] = ()
    is_over: bool = False
    earlier: list[int] = field(default_factory=list)
    earlier_logprobs: list[float] = field(default_factory=list)
    _row_tokens: RowTokens | None = None

    @staticmethod
    def of(state: Any, number: int, params: SamplingParams, after: Request | None = None, group: int = 0) -> Request:
        """A request that has just arrived."""
        return Request(state, number, np.asarray(state.initial_tokens, np.int64), params, after, group)

    @property
    def turn(self) -> tuple[int, int, int]:
        """Whose is lower comes first: of requests that arrived together the one that may get more tokens."""
        most = self.state.max_new_tokens
        return self.group, -(UNLIMITED if most is None else most), self.number

    @property
    def limit(self) -> int:
        """Tokens that it may get yet."""
        most = self.state.max_new_tokens
        return UNLIMITED if most is None else most - len(self.earlier)

    @property
    def ends(self) -> set[int]:
        """After these tokens it is over."""
        held: set[int] = self.state._eos_token_ids
        return held

    @property
    def most_stored(self) -> int:
        """Tokens that pages hold of it in the end, at most: the last one is never stored."""
        return min(len(self.prompt) + self.limit - 1, UNLIMITED)

    def row_tokens(self, page_size: int) -> RowTokens:
        """Its prompt as an index of pages takes it."""
        if self._row_tokens is None:
            self._row_tokens = RowTokens(self.prompt, page_size)
        return self._row_tokens

    def leave(self) -> None:
        """It is in no slot."""
        self.slot, self.done, self.found, self._row_tokens = -1, 0, (), None

    def start_over(self, chosen: list[int], logprobs: list[float]) -> None:
        """Out of the batch, it has to be computed again, with what was `chosen` so far."""
        self.earlier += chosen
        self.earlier_logprobs += logprobs
        self.prompt = np.concatenate((self.prompt, np.asarray(chosen, np.int64)))
        self.place = -1
        self.leave()

    def set_tokens(self, chosen: list[int], logprobs: list[float]) -> None:
        """What its output shows."""
        self.state.generated_tokens = (self.earlier + chosen)[: self.state.max_new_tokens]
        self.state.logprobs = (self.earlier_logprobs + logprobs)[: self.state.max_new_tokens]

    def append(self, token: int, logprob: float | None) -> None:
        """Its output shows one token more."""
        self.state.generated_tokens.append(token)
        if logprob is not None:
            self.state.logprobs.append(logprob)

    def note_time(self) -> None:
        """A token has arrived now."""
        if self.state.record_timestamps:
            self.state._timestamps.append(time.perf_counter())

    @property
    def is_watched(self) -> bool:
        """Every single token of it is looked at when it arrives."""
        return bool(self.state.streaming or self.state.record_timestamps)

    @property
    def is_waited_for(self) -> bool:
        """Its prompt is not computed yet, and will be."""
        return not self.is_over and self.place < 0

    def admitted(self) -> None:
        """It has got a slot."""
        if self.state.status == RequestStatus.PENDING:
            self.state.status = RequestStatus.PREFILLING

    def started(self) -> None:
        """Its first token has arrived."""
        self.state.status = RequestStatus.DECODING

    def finished(self) -> None:
        """Its last token has arrived."""
        self.is_over = True
        self.state.status = RequestStatus.FINISHED

    def failed(self, error: Exception) -> None:
        """It gets no more tokens."""
        self.is_over = True
        self.state.error = str(error)
        self.state.status = RequestStatus.FAILED
