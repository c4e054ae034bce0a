"""Sums over the bits of many tensors in one launch, by which a later change of any of them is noticed.

A word's share of a sum depends on its place, and is no linear function of the word: an exchange of two rows, or two changes
that would cancel each other, are seen too. `reference` in `weight_sum_reference.py` gives other sums of the same kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of
from hf_fastattn.kernels.rehearsal import prepared

# Words of 4 bytes that a program reads at a time, and that one entry of the table has at most.
BLOCK, CHUNK = 2048, 65536
PROGRAMS = 1024


@triton.jit
def weight_sum_kernel(table_ptr, out_ptr, chunks, BLOCK: tl.constexpr):
    """The entries `[address, words, salt]` of a table, every `num_programs`-th of them."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.uint32)
    mixed = tl.zeros([BLOCK], tl.uint32)
    for chunk in range(pid, chunks, tl.num_programs(0)):
        # Known to be multiples, they are read 16 bytes at a time.
        words_ptr = tl.multiple_of(tl.load(table_ptr + chunk * 3).to(tl.pointer_type(tl.uint32)), 16)
        count = tl.multiple_of(tl.load(table_ptr + chunk * 3 + 1).to(tl.int32), 4)
        salt = lane.to(tl.uint32) * 0x9E3779B9 + tl.load(table_ptr + chunk * 3 + 2).to(tl.uint32)
        for first in range(0, count, BLOCK):
            place = first + lane
            # Half of MurmurHash3's finalizer, whose few operations leave memory the slower part.
            word = (tl.load(words_ptr + place, mask=place < count, other=0) ^ salt) * 0x85EBCA6B
            word = (word ^ (word >> 15)) * 0xC2B2AE35
            total += word
            mixed = mixed * 0x01000193 + word
            salt += 0x632BE5AB
    both = (total.to(tl.uint64) << 32) | mixed.to(tl.uint64)
    both = both * (lane.to(tl.uint64) * 2 + 0x9E3779B97F4A7C15)
    tl.store(out_ptr + pid, tl.sum((both ^ (both >> 29)).to(tl.int64), 0))


def weight_sum(table: Tensor, out: Tensor) -> Tensor:
    """The sums of the tensors that a table lists.

    Args:
        table: `[chunks, 3]` int64 on their device: address and number of words of at most `CHUNK` words of a tensor, and a
            number that tells them from others; multiples of 16 bytes.
        out: `[n]` int64, of as many sums.

    Returns:
        `out`.
    """
    if not len(table):
        return out.zero_()
    with on_device_of(table):
        prepared(weight_sum_kernel)[(len(out),)](table, out, len(table), BLOCK=BLOCK, num_warps=4)
    return out


def table_of(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The table of tensors whose bytes are adjacent, and whose address and size are multiples of 16 bytes."""
    parts = []
    for tensor in tensors:
        words = tensor.numel() * tensor.element_size() // 4
        starts = torch.arange(0, words, CHUNK, dtype=torch.int64, device="cpu")
        parts.append(torch.stack((tensor.data_ptr() + 4 * starts, (words - starts).clamp(max=CHUNK)), 1))
    found = torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    salts = torch.arange(len(found), dtype=torch.int64, device="cpu") * 0x5851F42D % 2**32
    return torch.cat((found, salts[:, None]), 1).to(device)
