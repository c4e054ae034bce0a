"""`HostSteps`: decode steps of a running batch where none is recorded: on a CPU, or for a model that cannot be."""

from __future__ import annotations

from collections import deque
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
from hf_fastattn.kernels.sampling.reference import probabilities, token_logprobs
from hf_fastattn.patches.fused.forward import fused_forward, step_logits


class HostSteps:
    """The same as `DeviceSteps`, a forward after the other; rows that take no part cost nothing.

    Args:
        model: patched.
        pages: of the slots.
        slots: how many there are.
        choice: how tokens are chosen.
        device: of the model.
    """

    depth = 0
    # Pieces of prompts are computed apart.
    mixes = False
    columns = UNLIMITED

    def __init__(self, model: Any, pages: SlotPages, slots: int, choice: Choice, device: torch.device) -> None:
        self._model, self._pages, self._choice, self._device = model, pages, choice, device
        self._decoder = model._fastattn.decoder(model)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._params = torch.tensor([choice.params.values()], dtype=torch.float64).repeat(slots, 1)
        self._ready: deque[Arrived] = deque()
        self._generator = torch.Generator(device)
        self._generator.manual_seed(int(torch.randint(2**62, (1,))) if choice.seed is None else choice.seed)
        self._mask = torch.zeros(1, 1, 1, 1, device=device)

    def restart(self, columns: int, slots: Array, tokens: Array) -> None:
        """Nothing is under way, and these slots have chosen `tokens` last."""
        self.join(slots.tolist(), torch.from_numpy(tokens).to(self._device))

    def is_current(self) -> bool:
        """Nothing is recorded."""
        return True

    def first(self, logits: Tensor, numbers: Sequence[int], params: NDArray[np.float64]) -> Tensor:
        """The tokens `[n]`, packed, that follow prompts with `logits [n, V]` and are drawn by `params [n, PARAMS]`."""
        return self._chosen(logits, torch.from_numpy(params))

    def _chosen(self, logits: Tensor, params: Tensor) -> Tensor:
        """Packed tokens `[n]`."""
        choice = self._choice
        if not choice.do_sample:
            tokens = logits.argmax(-1)
            return pack(tokens, token_logprobs(logits, tokens) if choice.logprobs else None)
        likely = probabilities(logits, params if choice.own_params else choice.params)
        tokens = torch.multinomial(likely.float(), 1, generator=self._generator)
        return pack(tokens[:, 0], likely.gather(-1, tokens)[:, 0].log().float() if choice.logprobs else None)

    def join(self, slots: Sequence[int], packed: Tensor) -> None:
        """These slots' next input is `packed [n]`."""
        self._tokens[torch.tensor(slots, dtype=torch.int64, device=self._device)] = packed

    def send(self, packed: Tensor, tickets: Array) -> None:
        """What was chosen is there; `tickets` say for whom."""
        self._ready.append((tickets, *unpack(packed.cpu().numpy(), self._choice.logprobs)))

    def receive(self, wait: bool) -> Arrived | None:
        """Tickets, tokens and logprobs of the oldest step; None if all were taken."""
        return self._ready.popleft() if self._ready else None

    @property
    def under_way(self) -> int:
        """Steps and prompts whose tokens were not taken."""
        return len(self._ready)

    def forget(self) -> None:
        """Nobody reads what is under way."""
        self._ready.clear()

    def settle(self) -> None:
        """Nothing is under way."""

    def write(
        self, slots: Array, alive: NDArray[np.bool_], lengths: Array, numbers: Array, params: NDArray[np.float64]
    ) -> None:
        """Steps are told of their rows, but for the parameters `[n, PARAMS]` of their draws."""
        self._params[torch.from_numpy(slots)] = torch.from_numpy(params)
        self._pages.changes.clear()

    def bucket(self, used: int, steps: int) -> int:
        """Rows of what a step returns: slots that take no part cost nothing."""
        return len(self._tokens)

    def launch(self, rows: int, slots: Array, lengths: Array) -> Tensor:
        """One step of `slots`, which hold `lengths` tokens; returns the tokens, packed, of the first `rows` slots."""
        index = torch.from_numpy(slots).to(self._device)
        before = lengths.tolist()
        batch = self._pages.batch(slots.tolist(), before, [1] * len(before))
        cache = self._pages.cache
        positions = torch.tensor(before, dtype=torch.int64).to(self._device)
        with cache.using(batch):
            hidden = fused_forward(
                self._decoder, cache, input_ids=tokens_of(self._tokens[index])[:, None], inputs_embeds=None, use_cache=True,
                position_ids=positions[:, None], attention_mask=self._mask, return_dict=True,
            ).last_hidden_state  # fmt: skip
        logits = step_logits(self._model, hidden.flatten(0, 1))
        # The output layer may be on another device.
        self._tokens[index] = self._chosen(logits.to(self._device), self._params[torch.from_numpy(slots)])
        return self._tokens[:rows].clone()
