"""`PieceInputs`: pieces of prompts that a step computes beside its rows, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.graphs.static_inputs import ALIGNMENT
from hf_fastattn.kernels.sampling.params import PARAMS

# Prompts that a step computes a piece of, and tokens of all pieces, at most.
MOST_PIECES, MOST_TOKENS = 4, 256


@dataclass(frozen=True)
class Pieces:
    """Pieces of prompts, one after the other.

    Attributes:
        slots: of the running batch, one a piece; at least one, at most MOST_PIECES.
        before: tokens of each slot that are stored already.
        tokens: `[n]` of each piece.
        places: by window, `[T]` where all tokens are written: `page * P + offset`.
        numbers: which random numbers the token after each piece is drawn with.
        params: `[pieces, PARAMS]` of these draws.
    """

    slots: Sequence[int]
    before: Sequence[int]
    tokens: Sequence[NDArray[np.int64]]
    places: Sequence[NDArray[np.int64]]
    numbers: Sequence[int]
    params: NDArray[np.float64]


class PieceInputs:
    """Room for the largest pieces; a step takes the first tokens of each tensor.

    Args:
        device: of the model.
        windows: of its page tables.

    Attributes:
        params: `[MOST_PIECES, PARAMS]` fp32.
    """

    def __init__(self, device: torch.device, windows: Sequence[int | None]) -> None:
        self._windows, self._device = tuple(windows), device
        # Tokens, positions, places by window; then, by piece, its end, slot, number, and of all rows lengths and begins.
        rows = MOST_PIECES + 1
        sizes = [MOST_TOKENS] * (2 + len(self._windows)) + [MOST_PIECES] * 3 + [rows, rows + 1]
        begins = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        self._parts = [slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self._packed = torch.zeros(begins[-1], dtype=torch.int64, device=device)
            self.params = torch.zeros(MOST_PIECES, PARAMS, dtype=torch.float32, device=device)

    def write(self, pieces: Pieces, size: int, with_params: bool) -> None:
        """Put pieces in place, filled up to `size` tokens with those of a row that sees no key and writes nowhere.

        Args:
            with_params: each draws by parameters of its own.
        """
        count, counts = len(pieces.slots), [len(tokens) for tokens in pieces.tokens]
        used, host = sum(counts), np.zeros(len(self._packed), np.int64)
        parts = [host[part] for part in self._parts]
        tokens, positions, *places = parts[:-5]
        ends, slots, numbers, lengths, begins = parts[-5:]
        tokens[:used] = np.concatenate(pieces.tokens)
        first = np.asarray(pieces.before)
        positions[:used] = np.concatenate([np.arange(have, have + new) for have, new in zip(first, counts, strict=True)])
        for place, written in zip(places, pieces.places, strict=True):
            place[:] = -1
            place[:used] = written
        # What there is no piece for repeats the first one, and does the same again.
        for part, values in ((ends, np.cumsum(counts) - 1), (slots, pieces.slots), (numbers, pieces.numbers)):
            part[:] = values[0]
            part[:count] = values
        lengths[:count] = first + counts
        begins[1 : count + 1] = np.cumsum(counts)
        begins[count + 1 :] = size
        # From pageable memory this returns once the data is staged, without waiting for the device.
        self._packed.copy_(torch.from_numpy(host), non_blocking=True)
        if with_params:
            held = np.repeat(pieces.params[:1], MOST_PIECES, 0)
            held[:count] = pieces.params
            self.params.copy_(torch.from_numpy(held), non_blocking=True)

    def tokens(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens and positions, `[size]` int64 each."""
        first, second = self._parts[:2]
        return self._packed[first][:size], self._packed[second][:size]

    @property
    def ends(self) -> Tensor:
        """`[MOST_PIECES]` int64, the last token of each piece among those of all."""
        return self._packed[self._parts[-5]]

    @property
    def slots(self) -> Tensor:
        """`[MOST_PIECES]` int64, the slot of each."""
        return self._packed[self._parts[-4]]

    @property
    def numbers(self) -> Tensor:
        """`[MOST_PIECES]` int32, which random numbers they draw with."""
        return self._packed[self._parts[-3]].int()

    def batch(self, size: int, tables: Tensor, options: BatchOptions) -> Batch:
        """Of the first `size` tokens; its tensors are computed, by launches that a graph records too.

        Args:
            tables: `[W, rows, columns]` int32 page tables of all slots.
        """
        narrow = self._packed.int()
        places = [narrow[part][:size] for part in self._parts[2:-5]]
        # The last row, of padding tokens, sees no key: it needs no pages of its own.
        pages = tables.index_select(1, torch.cat((self.slots, self.slots[:1])))
        tensors = BatchTensors(
            slots=dict(zip(self._windows, places, strict=True)),
            page_tables=dict(zip(self._windows, pages, strict=True)),
            seq_lens=narrow[self._parts[-2]],
            cu_seqlens=narrow[self._parts[-1]],
        )
        return Batch.static(tensors, size, options)
