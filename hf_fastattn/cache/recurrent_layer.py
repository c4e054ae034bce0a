"""`RecurrentLayer`: the state of a linear-attention layer in a `PagedCache`, which a failed forward leaves as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class RecurrentLayer(LinearAttentionLayer):
    """Transformers' layer, but a new recurrent state replaces the old one instead of being written over it."""

    is_compileable = False
    record_past: bool

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep `recurrent_states` as the state `state_idx`, and return it."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def reset(self) -> None:
        """Forget the states, and with them for how many rows they were."""
        record_past = self.record_past
        super().__init__(self.number_of_states)
        self.record_past = record_past

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to put the layer back: references, since what is written in place is copied here."""
        held = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        # The convolution's last inputs, a few a channel, are the one state that a forward shifts in place.
        for index, state in self.conv_states.items():
            self.conv_states[index] = None if state is None else state.clone()
        return held

    def restore(self, held: dict[str, Any]) -> None:
        """Put the layer back to what it was at its `snapshot`."""
        self.__dict__.update(held)
