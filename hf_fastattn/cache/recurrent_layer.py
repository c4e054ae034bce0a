"""`RecurrentLayer`: the state of a linear-attention layer in a `PagedCache`, which a failed forward leaves as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import LinearAttentionLayer

# Tokens that a state can be taken back by, at most.
MOST_KEPT = 32

Pair = tuple[Tensor, Tensor]


class RecurrentLayer(LinearAttentionLayer):
    """Transformers' layer, but a new recurrent state replaces the old one instead of being written over it.

    Attributes:
        past: while the past is recorded, the states before and after each of the last tokens, the newest last; empty where
            a forward did not keep them.
    """

    is_compileable = False
    record_past: bool
    device: Any
    dtype: Any
    past: tuple[Pair, ...] = ()

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep `recurrent_states` as the state `state_idx`, and return it."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        self.past = ()
        return recurrent_states

    @property
    def states(self) -> Pair | None:
        """`[B, C, K]` last inputs of the convolution and `[B, HV, DK, DV]` state; None before the first forward."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        if conv is None or recurrent is None:
            return None
        missing = self.conv_kernel_size[0] - conv.shape[-1]
        # Transformers' own forward leaves as many inputs there as it has got, if it records its past.
        return functional.pad(conv, (missing, 0)) if missing else conv, recurrent

    def keep(self, conv: Tensor, recurrent: Tensor, past: tuple[Pair, ...] = ()) -> None:
        """Hold these states, in the place of those before; `past` ends with them."""
        if self.device is None:
            self.dtype, self.device = conv.dtype, conv.device
        self.conv_states[0], self.recurrent_states[0], self.past = conv, recurrent, past[-MOST_KEPT - 1 :]
        self.conv_kernel_size[0] = conv.shape[-1]
        for flags in (self.is_conv_states_initialized, self.is_recurrent_states_initialized, self.has_previous_state):
            flags[0] = True

    def lies_at(self, places: Pair | None) -> bool:
        """Whether these very tensors are the states."""
        return places is not None and self.conv_states[0] is places[0] and self.recurrent_states[0] is places[1]

    def lie_at(self, places: Pair) -> None:
        """`keep`, of a layer that lies elsewhere in tensors like these: at every step of every layer."""
        self.conv_states[0], self.recurrent_states[0] = places

    def reset(self) -> None:
        """Forget the states, and with them for how many rows they were."""
        record_past = self.record_past
        super().__init__(self.number_of_states)
        self.record_past, self.past = record_past, ()

    @property
    def reach(self) -> int:
        """Of how many last tokens the states before each are there."""
        return max(len(self.past) - 1, 0)

    @property
    def is_croppable(self) -> bool:
        """Whether states were kept from where the past began to be recorded, or from a `crop` on."""
        return bool(self.past)

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by `-tokens_to_remove` tokens, to a state of the `past`, which is the only one that is kept."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.reach:
            raise RuntimeError(
                f"crop({tokens_to_remove}) of a linear attention whose states reach back by {self.reach} tokens"
            )
        states = self.past[self.reach + tokens_to_remove] if self.past else self.states
        if states is not None:
            self.keep(*states, self.past and (states,))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` is."""
        super().reorder_cache(beam_idx)
        index = beam_idx.to(self.device) if self.past else beam_idx
        self.past = tuple((conv.index_select(0, index), held.index_select(0, index)) for conv, held in self.past)

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


def stock_fields(layer: Any) -> dict[str, Any]:
    """What a layer of Transformers would have as its attributes."""
    return {name: value for name, value in vars(layer).items() if name != "past"}


def own_states(fields: dict[str, Any]) -> None:
    """In the attributes of a layer, or a snapshot of them, states that are parts of larger tensors become copies."""
    for held in (fields["conv_states"], fields["recurrent_states"]):
        for place, state in list(held.items()):
            if state is not None and state.untyped_storage().nbytes() > state.nbytes:
                copy = state.clone()
                # Another thread may have put a later one there meanwhile.
                if held[place] is state:
                    held[place] = copy
