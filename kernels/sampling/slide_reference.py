"""`slide.slide` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def slide(seq_lens: Tensor, table: Tensor, *, page_size: int, sinks: int, leaving: int, pages: int) -> None:
    """Make room for a token in each row, as `slide.slide` does, on any device."""
    full = seq_lens >= pages * page_size
    moved = torch.roll(table[:, sinks:pages], -leaving, 1)
    table[:, sinks:pages] = torch.where(full[:, None], moved, table[:, sinks:pages])
    seq_lens.sub_(full * (leaving * page_size))
