"""`LoopTensors`: what a decode loop without the host keeps on the device between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Most end tokens of a call; shorter lists are padded with -1.
MOST_ENDS = 16
MOST_ROWS = 4096
# `packed` holds a token in the bits below this one, and at this bit whether its row is finished.
FINISHED_BIT = 40
# The value in `finished` of a padding row.
ABSENT = 2


@dataclass(frozen=True)
class LoopTensors:
    """What a decode loop keeps on the device, for B rows and W attention windows; all contiguous.

    Attributes:
        chosen: `[B]` int64, the tokens that the step chose.
        packed: `[B]` int64, written: the token, or the padding token, and at bit `FINISHED_BIT` whether the row is finished.
        tokens: `[B, 1]` int64, written: input of the next step.
        positions: `[B, 1]` int64, counted up.
        finished: `[B]` int32, 1 for a finished row, ABSENT for a padding row.
        limits: `[B]` int32, new tokens after which a row is finished.
        seq_lens: `[B]` int32, keys a row, counted up; 0 for padding rows, and with `drop` for finished rows.
        slots: `[W, >= B]` int32, written: where the next key of a row goes; -1 for rows whose `seq_lens` becomes 0.
        tables: `[W, >= B, columns]` int32 page tables.
        step: `[1]` int32, new tokens a row so far, counted up.
        ends: `[MOST_ENDS]` int64 end tokens, -1 where there are fewer.
        pad: `[1]` int64, the padding token, which finished rows get.
        drop: `[1]` int32: 1 if finished rows leave the attention, 0 if they go on, with padding tokens.
        seen: `[B, V]` uint8, 1 for each token of a row so far, or None.
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
