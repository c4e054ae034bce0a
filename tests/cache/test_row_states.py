"""States of linear attention in slots: random programs against rows that each have states of their own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from hf_fastattn.cache.recurrent_layer import RecurrentLayer
from hf_fastattn.cache.row_states import RowStates
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights
from hf_fastattn.kernels.linear.delta_reference import delta_step, delta_update
from tests.kernels.linear.delta_cases import KERNEL, parts

HEADS, SHARED, DK, DV = 1, 2, 4, 4
SIZES = (HEADS, SHARED, DK, DV)
CHANNELS = HEADS * (2 * DK + SHARED * DV)
Rows = dict[int, list[tuple[Tensor, Tensor]]]


def layers_with(rows: int, seed: int) -> tuple[dict[int, RecurrentLayer], Rows]:
    """Two layers that hold states of so many rows, and the same by row."""
    generator, layers, held = torch.Generator().manual_seed(seed), {}, {}
    for index in (0, 2):
        layers[index] = RecurrentLayer(1)
        conv = torch.randn(rows, CHANNELS, KERNEL, generator=generator)
        recurrent = torch.randn(rows, HEADS * SHARED, DK, DV, generator=generator)
        layers[index].keep(conv.clone(), recurrent.clone())
        held[index] = [(conv[row : row + 1], recurrent[row : row + 1]) for row in range(rows)]
    return layers, held


def slots_of(rows: int, moves: bool, layers: dict[int, RecurrentLayer]) -> RowStates:
    """Slots, more than are needed, all of which hold NaN."""
    states = RowStates(layers, (2 if moves else 1) * rows + 4)
    for tensors in states._layers.values():
        for tensor in tensors:
            tensor.fill_(math.nan)
    return states


def step(states: RowStates, held: Rows, weights: DeltaWeights, rows: int, lengths: list[int], seed: int) -> None:
    """One token more in all layers; every row's output is that of the row by itself."""
    x, _ = parts(rows + 1, *SIZES, seed=seed)
    # The last one is padding.
    seq_lens = torch.tensor([*(length + 1 for length in lengths), 0], dtype=torch.int32)
    for index, of_rows in held.items():
        out = delta_step(x, weights, states.of(index, rows + 1, seq_lens))
        assert not out[rows].any()
        for row in range(rows):
            alone = DeltaInputs(*(part[row : row + 1] for part in x))
            want, *after = delta_update(alone, weights, *of_rows[row])
            of_rows[row] = (after[0], after[1])
            torch.testing.assert_close(out[row : row + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("moves", [False, True])
def test_random_programs(seed: int, moves: bool) -> None:
    chance, rows = random.Random(seed), 1 + seed % 5
    layers, held = layers_with(rows, seed)
    states, weights = slots_of(rows, moves, layers), parts(1, *SIZES)[1]
    lengths = [chance.randrange(1, 9) for _ in range(rows)]
    states.load(layers, lengths, moves)
    assert all(layer.states is None for layer in layers.values())
    kept = list(range(rows))
    for number in range(12):
        if moves:
            parents = [chance.randrange(rows) for _ in range(rows)]
            states.follow(torch.tensor(parents))
            held = {index: [of_rows[row] for row in parents] for index, of_rows in held.items()}
            lengths = [lengths[row] for row in parents]
        elif rows > 1 and chance.random() < 0.2:
            chosen = sorted(chance.sample(range(rows), rows - 1))
            states.keep(chosen, rows)
            held = {index: [of_rows[row] for row in chosen] for index, of_rows in held.items()}
            lengths, kept, rows = [lengths[row] for row in chosen], [kept[row] for row in chosen], len(chosen)
        if chance.random() < 0.3:
            # A step that is only tried changes nothing.
            restore = states.hold_back()
            x, _ = parts(rows, *SIZES, seed=999)
            for index in held:
                delta_step(x, weights, states.of(index, rows, torch.tensor(lengths, dtype=torch.int32) + 1))
            restore()
        step(states, held, weights, rows, lengths, 100 * seed + number)
        lengths = [length + 1 for length in lengths]
    free = states.count - (2 * rows if moves else 1 + seed % 5)
    for conv, recurrent in states._layers.values():
        assert sum(bool(one.isnan().all()) for one in recurrent) >= free and not recurrent[kept].isnan().any()
        assert not conv[kept].isnan().any()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_states_come_back_in_transformers_order(length: int) -> None:
    layers, held = layers_with(3, length)
    states, lengths = slots_of(3, False, layers), [length, length + 1, 2]
    states.load(layers, lengths, False)
    weights = parts(1, *SIZES)[1]
    for number in range(5):
        step(states, held, weights, 3, lengths, number)
        lengths = [one + 1 for one in lengths]
    states.store(layers, lengths)
    for index, layer in layers.items():
        conv, recurrent = layer.states or (None, None)
        for row, (want_conv, want) in enumerate(held[index]):
            assert torch.equal(conv[row], want_conv[0])
            torch.testing.assert_close(recurrent[row], want[0], rtol=1e-4, atol=1e-5)


def test_room_is_for_states_of_one_shape() -> None:
    layers, _ = layers_with(2, 0)
    states = RowStates(layers, 4)
    assert states.fits(layers, 4) and not states.fits(layers, 5)
    layers[2].keep(torch.zeros(2, CHANNELS + 1, KERNEL), torch.zeros(2, 2, DK, DV))
    assert not states.fits(layers, 4)
