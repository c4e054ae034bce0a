"""`ForwardStates`: states of linear-attention layers while recorded forwards of Transformers' own loop read and write them.

Each row has two places. A forward reads one and writes the other, the next one the other way round: so one that fails, or
runs twice while it is recorded, changes nothing, and nothing is copied between forwards. The layers of the cache hold the
states where they lie. A cache that comes in between brings its own, and the one before gets copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hf_fastattn.cache.recurrent_layer import Pair, RecurrentLayer
from hf_fastattn.cache.row_states import state_shapes, states_of
from hf_fastattn.kernels.linear.delta_parts import StepStates


class Stepped(Protocol):
    """What is asked of a cache, a `ForwardCache`."""

    lengths: list[int]

    @property
    def recurrent_layers(self) -> dict[int, RecurrentLayer]: ...

    def own_states(self) -> None: ...

    def move_states(self, index: int, conv: Tensor, recurrent: Tensor) -> None: ...


class ForwardStates:
    """Two places for the states of each of up to `rows` rows.

    Args:
        layers: of a cache that holds a prompt, by index; their states say how large they are.
    """

    def __init__(self, layers: Mapping[int, RecurrentLayer], rows: int) -> None:
        self._shapes, self.rows, self._turn = state_shapes(layers), rows, 0
        self._layers: dict[int, Pair] = {}
        # By turn and number of rows: the states of each layer, as its cache holds them.
        self._views: dict[tuple[int, int], dict[int, Pair]] = {}
        self._holder: weakref.ref[Stepped] | None = None
        self.device = states_of(next(iter(layers.values())))[0].device
        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            numbers = torch.arange(2 * rows, dtype=torch.int32, device=self.device).view(2, rows)
            self._turns = torch.stack((numbers, numbers.flip(0)))
            self._slots = numbers.clone()

    def fits(self, layers: Mapping[int, RecurrentLayer], rows: int) -> bool:
        """Whether states of these layers have room."""
        return rows <= self.rows and self._shapes == state_shapes(layers)

    def take(self, cache: Stepped) -> None:
        """The layers of the cache, with a forward under way, hold their states here; the forward will read them."""
        layers, rows = cache.recurrent_layers, len(cache.lengths)
        before = None if self._holder is None else self._holder()
        if before is not None and before is not cache:
            before.own_states()
        self._holder = weakref.ref(cache)
        first = next(iter(layers))
        there = self._views.get((1, rows), {}).get(first)
        self._turn = 1 if there is not None and layers[first].recurrent_states[0] is there[1] else 0
        views = self._views.setdefault((self._turn, rows), {})
        with torch.inference_mode(False), torch.no_grad():
            for index, layer in layers.items():
                if not layer.lies_at(views.get(index)):
                    self._bring(index, layer, rows, cache)
            self._slots.copy_(self._turns[self._turn])

    def _bring(self, index: int, layer: RecurrentLayer, rows: int, cache: Stepped) -> None:
        """The layer holds its states in the places that are read."""
        held = states_of(layer)
        if index not in self._layers:
            # When they are needed, and the layer's own go at once: never are the states of all layers there three times.
            conv, recurrent = (state.new_empty(2 * self.rows, *state.shape[1:]) for state in held)
            self._layers[index] = conv, recurrent
        for turn in (0, 1):
            begin = turn * self.rows
            conv, recurrent = (places[begin : begin + rows] for places in self._layers[index])
            self._views.setdefault((turn, rows), {}).setdefault(index, (conv, recurrent))
        places = self._views[self._turn, rows][index]
        for place, state in zip(places, held, strict=True):
            if place is not state:
                place.copy_(state)
        cache.move_states(index, *places)

    def written(self, cache: Stepped) -> None:
        """The forward has run: the layers hold what it has written."""
        views = self._views[1 - self._turn, len(cache.lengths)]
        for index, layer in cache.recurrent_layers.items():
            layer.lie_at(views[index])

    def of(self, index: int, rows: int, seq_lens: Tensor) -> StepStates:
        """What a forward of the first `rows` rows reads and writes of a layer, whatever their lengths are."""
        conv, recurrent = self._layers[index]
        return StepStates(conv, recurrent, self._slots[0, :rows], conv, recurrent, self._slots[1, :rows])
