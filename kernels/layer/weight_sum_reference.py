"""Sums over the bits of tensors in plain PyTorch, on any device: see `weight_sum.py`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Words of 8 bytes that are added at a time: these stay in a processor's cache. A prime: no two rows of a matrix share lanes.
LANES = 32749
ODD = 0x5851F42D4C957F2D


def weight_sum(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A sum `[]` int64 for each device."""
    sums: dict[torch.device, Tensor] = {}
    shifted: dict[torch.device, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            device = tensor.device
            if device not in sums:
                sums[device] = torch.zeros(LANES, dtype=torch.int64, device=device)
                shifted[device] = torch.empty_like(sums[device])
            for words in _blocks(tensor):
                _add(sums[device][: len(words)], shifted[device][: len(words)], words)
        return [_folded(total) for total in sums.values()]


def _add(total: Tensor, shifted: Tensor, words: Tensor) -> None:
    # The shift keeps two changes of the highest bits from cancelling each other.
    torch.bitwise_right_shift(total, 29, out=shifted)
    total.bitwise_xor_(shifted)
    torch.add(words, total, alpha=-3, out=total)


def _folded(total: Tensor) -> Tensor:
    lanes = torch.arange(len(total), device=total.device) * 2 + ODD
    total = (total ^ (total >> 31)) * lanes
    return (total ^ (total >> 29)).sum()


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    """The bits of a tensor as int64, at most LANES at a time."""
    held = tensor.detach()
    flat = held.reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8
    if whole != flat.numel() * flat.element_size() or flat.data_ptr() % 8:
        # Few tensors: the bytes of what is no multiple of a word are padded in a copy.
        bits = flat.contiguous().view(torch.uint8)
        padded = bits.new_zeros(-(-len(bits) // 8) * 8)
        padded[: len(bits)] = bits
        return padded.view(torch.int64).split(LANES)
    return flat.view(torch.int64).split(LANES)
