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

# Words of 8 bytes that a program reads at a time, and those of 4 bytes that one entry of the table has at most.
BLOCK, CHUNK = 1024, 65536
# Four for each multiprocessor of an H200: memory is as quick as with more, and the launches beside this one find place.
PROGRAMS, WARPS = 528, 4


@triton.jit
def mixed(x):
    """MurmurHash3's finalizer, of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def weight_sum_kernel(table_ptr, out_ptr, chunks, BLOCK: tl.constexpr):
    """The entries `[address, words, salt]` of a table, every `num_programs`-th of them.

    Of each word of 8 bytes the halves, with numbers of their place added to them, are multiplied with each other, as in NH
    (Black et al., 1999, "UMAC"): three operations, so that memory is the slower part. The sum of the words shows what the
    product does not, whose other factor may be 0.
    """
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], tl.uint64)
    plain = tl.zeros([BLOCK], tl.uint64)
    # By how much the numbers differ from block to block: another one in every lane, or equal sums of rows would be missed.
    low_step = mixed(lane.to(tl.uint32) * 2 + 0x9E3779B9) | 1
    high_step = mixed(low_step) | 1
    for chunk in range(pid, chunks, tl.num_programs(0)):
        # Known to be multiples, they are read 16 bytes at a time.
        words_ptr = tl.multiple_of(tl.load(table_ptr + chunk * 3).to(tl.pointer_type(tl.uint64)), 16)
        count = tl.multiple_of(tl.load(table_ptr + chunk * 3 + 1).to(tl.int32) // 2, 2)
        salt = tl.load(table_ptr + chunk * 3 + 2).to(tl.uint32)
        low_key = mixed(lane.to(tl.uint32) ^ mixed(salt + 0x632BE5AB))
        high_key = mixed(low_key + 0x01000193)
        for first in range(0, count, BLOCK):
            place = first + lane
            word = tl.load(words_ptr + place, mask=place < count, other=0)
            low = word.to(tl.uint32) + low_key
            high = (word >> 32).to(tl.uint32) + high_key
            products += low.to(tl.uint64) * high.to(tl.uint64)
            plain += word
            low_key += low_step
            high_key += high_step
    both = products ^ (plain * 0x9E3779B97F4A7C15)
    both = (both ^ (both >> 32)) * (lane.to(tl.uint64) * 2 + 0x9E3779B97F4A7C15)
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
        prepared(weight_sum_kernel)[(len(out),)](table, out, len(table), BLOCK=BLOCK, num_warps=WARPS)
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
