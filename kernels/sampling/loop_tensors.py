"""`LoopTensors`: what a decode loop that feeds itself keeps on the device between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# End tokens that a call may have; shorter lists are filled with -1.
MOST_ENDS = 16
MOST_ROWS = 4096
# `packed` holds a token and, from this bit on, whether its row has finished.
FINISHED_BIT = 40
# In `finished`: there is no such row.
ABSENT = 2


@dataclass(frozen=True)
class LoopTensors:
    """What a decode loop keeps on the device, for B rows and W attention windows; all contiguous.

    Attributes:
        chosen: `[B]` int64, the tokens that the step chose.
        packed: `[B]` int64, written: the token, or padding, and at bit `FINISHED_BIT` whether the row has finished.
        tokens: `[B, 1]` int64, written: input of the next step.
        positions: `[B, 1]` int64, counted up.
        finished: `[B]` int32, 1 for a row that has finished, ABSENT for one that fills up a batch.
        limits: `[B]` int32, new tokens after which a row ends.
        seq_lens: `[B]` int32, keys a row, counted up; 0 for absent rows, and if `drop` for those that have finished.
        slots: `[W, >= B]` int32, written: where the next key of a row goes; -1 for those rows.
        tables: `[W, >= B, columns]` int32 page tables.
        step: `[1]` int32, new tokens a row so far, counted up.
        ends: `[MOST_ENDS]` int64 end tokens, -1 where there are fewer.
        pad: `[1]` int64, the token of rows that have finished.
        drop: `[1]` int32, whether rows that have finished leave the attention, or go on reading and writing padding.
        seen: `[B, V]` uint8, tokens of a row, or None.
    """

    chosen: Tensor
    packed: Tensor
    tokens: Tensor
    positions: Tensor
    finished: Tensor
    limits: Tensor
    seq_lens: Tensor
    slots: Tensor
    tables: Tensor
    step: Tensor
    ends: Tensor
    pad: Tensor
    drop: Tensor
    seen: Tensor | None = None
