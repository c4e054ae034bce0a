"""`advance.advance` in plain PyTorch."""

from __future__ import annotations

import torch

from hf_fastattn.kernels.sampling.loop_tensors import ABSENT, FINISHED_BIT, LoopTensors


def advance(state: LoopTensors, page_size: int) -> None:
    """Make the chosen tokens the next inputs, as `advance.advance` does, on any device."""
    token = torch.where(state.finished != 0, state.pad, state.chosen)
    is_end = (token[:, None] == state.ends[None]).any(1)
    state.step.add_(1)
    ends = (is_end | (state.step >= state.limits)).int()
    state.finished.copy_(torch.where(state.finished == 0, ends, state.finished))
    state.tokens.copy_(token[:, None])
    state.packed.copy_(token + ((state.finished != 0).long() << FINISHED_BIT))
    state.positions.add_(1)
    gone = (state.finished == ABSENT) | ((state.finished != 0) & (state.drop != 0))
    length, rows = state.seq_lens.clone(), torch.arange(len(token), device=token.device)
    state.seq_lens.copy_(torch.where(gone, 0, length + 1))
    for window, table in enumerate(state.tables):
        page = table[rows, torch.where(gone, 0, length // page_size).long()]
        state.slots[window, : len(token)].copy_(torch.where(gone, -1, page * page_size + length % page_size))
    if state.seen is not None:
        known = (token >= 0) & (token < state.seen.shape[1])
        state.seen[rows[known], token[known]] = 1
