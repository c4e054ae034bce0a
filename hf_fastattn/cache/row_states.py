"""`RowStates`: states of linear-attention layers in slots that stay where they are, for steps that graphs hold.

A row's slot is named by a table on the device. Steps of rows that stay themselves write each state where it was. In a beam
search rows go on as others: every row owns two slots, a step reads those of the rows' parents and writes to the free ones,
so that no state is copied for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_fastattn.cache.recurrent_layer import RecurrentLayer
from hf_fastattn.kernels.linear.delta_parts import StepStates


class RowStates:
    """Slots for up to `rows` rows, two each where they move.

    Args:
        layers: of a cache that holds a prompt, by index; their states say how large they are.
        slots: how many there are.
    """

    def __init__(self, layers: Mapping[int, RecurrentLayer], slots: int) -> None:
        self._shapes, self.count, self.moves = state_shapes(layers), slots, False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            for index, layer in layers.items():
                conv, recurrent = (
                    torch.zeros(slots, *held.shape[1:], dtype=held.dtype, device=held.device) for held in states_of(layer)
                )
                self._layers[index] = conv, recurrent
            self._numbers = torch.arange(slots, dtype=torch.int32, device=conv.device)
            # Sum of the two slots of a row that moves.
            self._pairs = 2 * self._numbers + slots // 2
            self._slots, self._slots_out = (torch.full_like(self._numbers, -1) for _ in range(2))

    def fits(self, layers: Mapping[int, RecurrentLayer], slots: int) -> bool:
        """Whether states of these layers have room."""
        return slots <= self.count and self._shapes == state_shapes(layers)

    def load(self, layers: Mapping[int, RecurrentLayer], lengths: Sequence[int], moves: bool) -> None:
        """Take the states of all rows over; the layers are left empty.

        Args:
            lengths: tokens of the rows so far.
            moves: rows will go on as others.
        """
        self.moves, rows = moves, len(lengths)
        for table in (self._slots, self._slots_out):
            table.fill_(-1)
            table[:rows] = self._numbers[:rows]
        for index, layer in layers.items():
            conv, recurrent = states_of(layer)
            held = self._layers[index]
            held[0][:rows] = conv if moves else conv.gather(2, self._turned(lengths, conv, -1))
            held[1][:rows] = recurrent
            layer.reset()

    def store(self, layers: Mapping[int, RecurrentLayer], lengths: Sequence[int]) -> None:
        """Give the states of all rows back, of which none has moved or left."""
        for index, layer in layers.items():
            conv, recurrent = (held[: len(lengths)] for held in self._layers[index])
            layer.keep(conv.gather(2, self._turned(lengths, conv, 1)), recurrent.clone())

    @staticmethod
    def _turned(lengths: Sequence[int], conv: Tensor, direction: int) -> Tensor:
        """Where the inputs of the convolution come from: oldest first becomes a ring (-1), or a ring oldest first (1)."""
        size = conv.shape[2]
        first = torch.tensor(lengths, device="cpu")[:, None] + 1
        places = (torch.arange(size, device="cpu") + direction * first) % size
        return places[:, None].to(conv.device).expand_as(conv)

    @property
    def device(self) -> torch.device:
        """Of all states."""
        return self._numbers.device

    def of(self, index: int, rows: int, seq_lens: Tensor) -> StepStates:
        """What a step of the first `rows` rows reads and writes of a layer.

        Args:
            seq_lens: `[rows]` tokens with the new one.
        """
        conv, recurrent = self._layers[index]
        slots = self._slots[:rows]
        if self.moves:
            return StepStates(conv, recurrent, slots, conv, recurrent, self._slots_out[:rows])
        return StepStates(conv, recurrent, slots, conv, recurrent, slots, seq_lens)

    def keep(self, kept: Sequence[int], used: int) -> None:
        """Row b becomes row `kept[b]`; the others up to `used` rows have no states."""
        index = torch.tensor(kept, device="cpu").to(self._slots.device, non_blocking=True)
        self._slots[: len(kept)] = self._slots.index_select(0, index)
        self._slots[len(kept) : used].fill_(-1)

    def follow(self, parents: Tensor) -> None:
        """After a step of rows that move: row b goes on from what row `parents[b]` has written."""
        rows = len(parents)
        written = self._slots_out[:rows]
        self._slots[:rows] = written.index_select(0, parents)
        written.copy_(self._pairs[:rows] - written)

    def hold_back(self) -> Callable[[], None]:
        """Steps change no state until the function that this returns is called."""
        tables = (self._slots, self._slots_out)
        before = [table.clone() for table in tables]
        for table in tables:
            table.fill_(-1)

        def restore() -> None:
            for table, value in zip(tables, before, strict=True):
                table.copy_(value)

        return restore


def states_of(layer: RecurrentLayer) -> tuple[Tensor, Tensor]:
    """The states of a layer that has some."""
    assert layer.states is not None
    return layer.states


def state_shapes(layers: Mapping[int, RecurrentLayer]) -> list[tuple[object, ...]]:
    """Of each layer, by index, what the states of a row have in common with those of other rows."""
    return [
        (index, *((held.shape[1:], held.dtype, held.device) for held in states_of(layer))) for index, layer in layers.items()
    ]
