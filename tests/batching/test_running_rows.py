"""What is kept from step to step of the slots that take part is what looking at all of them anew would give."""

from __future__ import annotations

import numpy as np
import pytest

from hf_fastattn.batching.running_rows import RunningRows
from hf_fastattn.kernels.sampling.params import SamplingParams

SLOTS = 7


@pytest.mark.parametrize("seed", range(20))
def test_random_programs(seed: int) -> None:
    rng, rows = np.random.default_rng(seed), RunningRows(SLOTS)
    for number in range(300):
        free = np.flatnonzero(~rows.alive).tolist()
        what = rng.integers(10)
        if free and what < 3:
            length, left = int(rng.integers(1, 9)), int(rng.integers(0, 12))
            room = length + int(rng.integers(0, 6))
            rows.join(int(rng.choice(free)), length, room, left, length + left, number, (number, number), SamplingParams())
        elif rows.count and what == 3:
            rows.leave(int(rng.choice(rows.slots)))
        elif free and rows.count and what == 4:
            rows.move(int(rng.choice(rows.slots)), int(rng.choice(free)))
        else:
            wanted = np.minimum(rows.lengths + 2, rows.most)
            short = np.flatnonzero(rows.alive & (wanted > rows.room)).tolist()
            assert rows.short() == short
            for slot in short:
                # As `RunningBatch.extend` does: for the next token, or some more.
                rows.room[slot] = int(wanted[slot]) + int(rng.integers(0, 3))
            assert rows.short() == []
            lengths, over = rows.lengths.copy(), np.flatnonzero(rows.alive & (rows.left <= 1)).tolist()
            assert rows.step() == over
            assert (rows.lengths == lengths + rows.alive).all()
            for slot in over:
                rows.leave(slot)
        assert rows.count == rows.alive.sum() and rows.slots.tolist() == np.flatnonzero(rows.alive).tolist()
