"""Sum over ranks, residual and RMSNorm in one launch, of few rows: each rank writes its row into the memory of the others.

`s = sum over ranks of x_r + residual`, `y = s / sqrt(mean(s^2) + eps) * weight`, as in `summed_norm.py`, where ranks read
each other's rows behind a flag: the flag crosses to the other GPU, and then the row crosses back. Here a row crosses once,
and there is no flag beside it: of each word of 8 bytes, which a GPU writes and reads at once, one half is the number of the
launch. A program takes one row: it writes its rank's words to every rank's inbox, and looks at its own inbox until all words
have this launch's number. Twice the bytes cross, which is nothing for few rows. From NCCL ("LL", its protocol for small
messages).

Ranks count the launches of each row, and inboxes have two places for a row, by turns: who writes to a place again has seen
words of the launch in between from every rank, which that one wrote after the launch that read the place had ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.norm import ELEMENTS_PER_WARP, MAX_HIDDEN
from hf_fastattn.kernels.layer.summed_norm import LOOKS, add_to_residual, check_added
from hf_fastattn.kernels.rehearsal import prepared

# Bytes of a word that hold elements; the other half is a number.
HELD = 4
# Words that are looked at at once, in registers.
MOST_WORDS = 8192


@triton.jit
def _elements(words, dtype: tl.constexpr, PER_WORD: tl.constexpr):
    """What the lower halves of `words: [R, W]` hold, in fp32: `[R, W, PER_WORD]`."""
    bits = words.to(tl.int32)
    if PER_WORD == 1:
        elements = tl.expand_dims(bits.to(dtype, bitcast=True), 2)
    else:
        pairs = tl.join((bits & 0xFFFF).to(tl.int16), (bits >> 16).to(tl.int16))
        elements = pairs.to(dtype, bitcast=True)
    return elements.to(tl.float32)


@triton.jit
def pushed_norm_kernel(
    x_ptr, inboxes_ptr, launch_ptr, late_ptr, residual_ptr, bias_ptr, weight_ptr, out_ptr, sum_ptr, eps, stride_r,
    rank, room, most_looks,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PER_WORD: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `[T, WORDS * PER_WORD]`; `inboxes_ptr` are addresses by rank, each `[2, RANKS, room, WORDS]` int64."""
    word = tl.arange(0, BLOCK)  # [BLOCK]
    ok = word < WORDS
    column = word[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]  # [BLOCK, PER_WORD], as the row below
    ok_column = ok[:, None] & (column >= 0)
    row = tl.program_id(0).to(tl.int64)
    hidden: tl.constexpr = WORDS * PER_WORD
    weight = tl.load(weight_ptr + column, mask=ok_column, other=0.0)
    if OVERLAP:
        gdc_wait()
    number = tl.load(launch_ptr + row) + 1
    words_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    words = tl.load(words_ptr + row * WORDS + word, mask=ok, other=0).to(tl.int64) & 0xFFFFFFFF
    words |= number.to(tl.int64) << 32
    turn = (number & 1) * RANKS
    for other in tl.static_range(RANKS):
        there_ptr = tl.multiple_of(tl.load(inboxes_ptr + other).to(tl.pointer_type(tl.int64)), 16)
        tl.store(there_ptr + ((turn + rank) * room + row) * WORDS + word, words, mask=ok, cache_modifier=".wt")
    residual = tl.load(residual_ptr + row * stride_r + column, mask=ok_column, other=0.0)
    # While words are under way, the next launch may read its weights.
    if OVERLAP:
        gdc_launch_dependents()
    here_ptr = tl.multiple_of(tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64)), 16)
    total = tl.zeros([BLOCK, PER_WORD], tl.float32)
    looks = 0
    # In the same order on every rank.
    for first in range(0, RANKS, BLOCK_R):
        writer = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        wanted = (writer < RANKS)[:, None] & ok[None, :]
        places = ((turn + writer) * room + row)[:, None] * WORDS + word[None, :]  # [BLOCK_R, BLOCK]
        held = tl.load(here_ptr + places, mask=wanted, other=0, volatile=True)
        while (tl.max((wanted & ((held >> 32).to(tl.int32) != number)).to(tl.int32)) > 0) & (looks < most_looks):
            held = tl.load(here_ptr + places, mask=wanted, other=0, volatile=True)
            looks += 1
        total += tl.sum(_elements(held, x_ptr.dtype.element_ty, PER_WORD), 0)
    if looks >= most_looks:
        tl.store(late_ptr, 1)
    # Not before every thread has read it: none is past the first look until all have come to it.
    tl.store(launch_ptr + row, number)
    wide = add_to_residual(total, residual, x_ptr, bias_ptr, sum_ptr + row * hidden, column, ok_column)
    inverse = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / hidden + eps)
    scale = weight.to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    tl.store(out_ptr + row * hidden + column, (wide * inverse * scale).to(out_ptr.dtype.element_ty), mask=ok_column)


def words_of(hidden: int, dtype: torch.dtype) -> int:
    """Words of a row in an inbox; 0 if rows do not fill whole words."""
    return 0 if hidden * dtype.itemsize % HELD else hidden * dtype.itemsize // HELD


def pushed_norm(
    x: Tensor,
    inboxes: Tensor,
    room: int,
    launches: Tensor,
    late: Tensor,
    rank: int,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    looks: int = LOOKS,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum of every rank's x and the residual, and that sum.

    Args:
        x: `[T, hidden]` bf16, fp16 or fp32, contiguous, rows of whole words of 4 bytes: the part of this rank, for it alone.
        inboxes: `[ranks]` int64, where each rank's inbox is, as this device sees it: `[2, ranks, room, words]` int64, at a
            multiple of 16 bytes, zeros at first, with `words_of(hidden, dtype)` words.
        room: rows of an inbox, T at most.
        launches: `[>= T]` int32, zeros at first; counted by the kernel.
        late: `[1]` int32, set if a rank was waited for in vain; what is returned is worth nothing then.
        rank: this one's number.
        residual: `[T, hidden]` of the dtype of x or fp32.
        weight: `[hidden]`, which no launch that may still be running writes.
        eps: added to the mean square.
        bias: `[hidden]`, added once.
        unit_offset: multiply by `1 + weight`.
        dtype: of the normalised rows; by default that of the residual.
        looks: at the inbox, before a rank is late.

    Returns:
        The normalised rows and the sums, the latter in the dtype of the residual, both `[T, hidden]`, contiguous. The sum
        over ranks is rounded to the dtype of x, as an all-reduce would, and so is the sum with a bias.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    known = x.ndim == 2 and x.dtype in DTYPES and x.is_contiguous() and 0 < x.shape[1] <= MAX_HIDDEN
    if not known or not words_of(x.shape[1], x.dtype):
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, must be [T, hidden] with hidden from 1 to {MAX_HIDDEN}, even in 16 bits, "
            f"contiguous, of a dtype among {DTYPES}"
        )
    tokens, hidden = x.shape
    check_added(x, residual, weight, bias)
    if inboxes.ndim != 1 or not 0 <= rank < len(inboxes) or tokens > min(room, len(launches)):
        raise ValueError(
            f"inboxes {tuple(inboxes.shape)} must be [ranks] with rank={rank} among them, and room={room} and launches "
            f"{tuple(launches.shape)} at least {tokens}"
        )
    out = torch.empty((tokens, hidden), dtype=dtype or residual.dtype, device=x.device)
    total = torch.empty((tokens, hidden), dtype=residual.dtype, device=x.device)
    if not tokens:
        return out, total
    words, overlap = words_of(hidden, x.dtype), overlaps_launches(arch_of(x.device))
    block = power_of_2(words)
    with on_device_of(x):
        prepared(pushed_norm_kernel)[(tokens,)](
            x, inboxes, launches, late, residual, bias, weight, out, total, eps, residual.stride(0), rank, room, looks,
            WORDS=words, BLOCK=block, PER_WORD=hidden // words, RANKS=len(inboxes), UNIT_OFFSET=unit_offset, OVERLAP=overlap,
            BLOCK_R=min(power_of_2(len(inboxes)), max(MOST_WORDS // block, 1)),
            num_warps=min(max(power_of_2(hidden) // ELEMENTS_PER_WARP, 1), 16),
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out, total
