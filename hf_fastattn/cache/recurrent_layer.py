"""`RecurrentLayer`: the state of a linear-attention layer in a `PagedCache`, which a failed forward leaves as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class RecurrentLayer(LinearAttentionLayer):
    """Transformers' layer, but a new recurrent state replaces the old one instead of being written over it."""

    is_compileable = False
    record_past: bool
    device: Any
    dtype: Any

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep `recurrent_states` as the state `state_idx`, and return it."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    @property
    def states(self) -> tuple[Tensor, Tensor] | None:
        """`[B, C, K]` last inputs of the convolution and `[B, HV, DK, DV]` state; None before the first forward."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        return None if conv is None or recurrent is None else (conv, recurrent)

    def keep(self, conv: Tensor, recurrent: Tensor) -> None:
        """Hold these states, in the place of those before."""
        if self.device is None:
            self.dtype, self.device = conv.dtype, conv.device
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.conv_kernel_size[0] = conv.shape[-1]
        for flags in (self.is_conv_states_initialized, self.is_recurrent_states_initialized, self.has_previous_state):
            flags[0] = True

    def reset(self) -> None:
        """Forget the states, and with them for how many rows they were."""
        record_past = self.record_past
        super().__init__(self.number_of_states)
        self.record_past = record_past

    def snapshot(self, in_place: bool = True) -> dict[str, Any]:
        """What `restore` needs to put the layer back: references, since what is written in place is copied here.

        Args:
            in_place: Transformers' own forward may follow.
        """
        held = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        if not in_place:
            return held
        # The convolution's last inputs, a few a channel, are the one state that a forward shifts in place.
        for index, state in self.conv_states.items():
            self.conv_states[index] = None if state is None else state.clone()
        return held

    def restore(self, held: dict[str, Any]) -> None:
        """Put the layer back to what it was at its `snapshot`."""
        self.__dict__.update(held)


def own_states(fields: dict[str, Any]) -> None:
    """In the attributes of a layer, or a snapshot of them, states that are parts of larger tensors become copies."""
    for held in (fields["conv_states"], fields["recurrent_states"]):
        for place, state in list(held.items()):
            if state is not None and state.untyped_storage().nbytes() > state.nbytes:
                copy = state.clone()
                # Another thread may have put a later one there meanwhile.
                if held[place] is state:
                    held[place] = copy
