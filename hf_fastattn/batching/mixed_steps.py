"""`MixedSteps`: decode steps of a running batch that compute pieces of prompts beside their rows, in the same forward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.batching.device_steps import FIRST, DeviceSteps
from hf_fastattn.batching.packed_tokens import pack, tokens_of
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.piece_inputs import MOST_PIECES, Pieces
from hf_fastattn.loop.token_choice import choose_first
from hf_fastattn.patches.fused.forward import fused_forward, step_logits

# Tokens of a forward, in steps with few of them: with up to 128 a step of an H200 takes hardly longer than with one.
UNIT = 128
# Pieces grow by UNIT where prompts have more tokens than so many pieces of the smaller size.
MANY = 4
# A step with pieces is recorded where so many pieces of its prompts have been computed apart, or are to come.
WORTH_RECORDING = 24


def most_rows() -> int:
    """Beside more rows a piece takes as long as apart: products of all tokens are no longer bound by reading weights."""
    return UNIT // 2


def _sizes() -> list[tuple[int, int]]:
    """Rows of steps, and tokens of prompts in them, the smaller one first."""
    return [(UNIT // 2, UNIT // 2), (UNIT // 2, UNIT // 2 + UNIT)]


class MixedSteps(DeviceSteps):
    """`DeviceSteps`, of which some take in pieces of prompts: weights are read once for both."""

    mixes = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._apart: Counter[GraphKey] = Counter()

    def record_mixed(self) -> None:
        """Record the steps with pieces of prompts; nobody takes part in any."""
        windows = [np.full(1, -1, np.int64)] * len(self._pages.cache.tables)
        params = np.array([self._choice.params.values()])
        nothing = Pieces([0], [0], [np.zeros(1, np.int64)], windows, [0], params)
        for size in _sizes():
            self.launch_mixed(size, nothing)

    def mixed_size(self, used: int, pending: int, patient: bool = False) -> tuple[int, int] | None:
        """Rows of a step for the first `used` slots, and tokens of prompts in it; None if these are to be computed apart.

        Args:
            pending: tokens that prompts have to compute yet.
            patient: they are not waited for, and pieces small.
        """
        if used > most_rows():
            return None
        sizes = _sizes()
        if patient:
            sizes.pop()
        elif pending > MANY * sizes[0][1]:
            sizes.reverse()
        version = self._pages.cache.groups.storage_version
        for size in sizes:
            if self._graphs.has(self._key(*size), version):
                return size
        key = self._key(*sizes[0])
        if self._graphs.has_failed(key):
            return None
        self._apart[key] += 1
        return sizes[0] if self._apart[key] + pending // sizes[0][1] >= WORTH_RECORDING else None

    def launch_mixed(self, size: tuple[int, int], pieces: Pieces) -> Tensor:
        """One step of the first rows, and of pieces of prompts, both at most of `size`.

        Where a prompt ends with its piece, its slot's next input is the token that follows; elsewhere nobody reads it.

        Returns:
            Packed tokens, of the rows and then of MOST_PIECES pieces, which the next step writes to.
        """
        key, cache = self._key(*size), self._pages.cache
        numbers = [number % FIRST + FIRST for number in pieces.numbers]
        self._state.pieces.write(replace(pieces, numbers=numbers), key.pieces, key.own_params)
        return self._graphs.replay(key, cache.groups, lambda: self._run_mixed(key), self._pages.counters)

    def _run_mixed(self, key: GraphKey) -> Tensor:
        state, cache, workspace, pieces = self._state, self._pages.cache, self._graphs.workspace, self._state.pieces
        assert workspace is not None
        batch = state.batch(key, cache.groups.backend, cache.groups.batch_invariant, workspace)
        given, (tokens, positions) = state.arguments(key.rows), pieces.tokens(key.pieces)
        given["input_ids"] = torch.cat((given["input_ids"][:, 0], tokens))[None]
        given["position_ids"] = torch.cat((given["position_ids"][:, 0], positions))[None]
        with cache.using(batch):
            hidden = fused_forward(self._decoder, cache, **given, use_cache=True, return_dict=True).last_hidden_state[0]
        batch.forget_tables()
        ends = hidden.index_select(0, pieces.ends + key.rows)
        logits = step_logits(self._model, torch.cat((hidden[: key.rows], ends)))
        chosen = self._go_on(key, logits[: key.rows])
        logprobs = torch.empty(MOST_PIECES, device=logits.device) if key.logprobs else None
        params = pieces.params if key.own_params else state.params
        drawn = params if key.do_sample else None
        first = pack(choose_first(state, logits[key.rows :], pieces.numbers, drawn, logprobs), logprobs)
        # After what `advance` has left there.
        self._held.tokens[:, 0].index_copy_(0, pieces.slots, tokens_of(first))
        return torch.cat((chosen, first))
