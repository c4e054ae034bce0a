"""The causal convolution of Gated DeltaNet over packed rows, with SiLU, and the inputs that the next token's will want.

`y_t = silu(sum_i weight_i x_{t - K + 1 + i})` a channel; before a row's first token stand its last inputs so far, or zeros.
A program takes a chunk of a row and the channels of one head. Rounded where Transformers rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.linear.delta_chunks import Chunks
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights
from hf_fastattn.kernels.quick_launch import launch


@triton.jit
def _input_of(
    head, q_ptr, k_ptr, v_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Where a head of q, k or v lies, from a token of it to the next, its first channel and how many it has."""
    if head < HK:
        x_ptr, stride, channel, size = q_ptr + head * stride_qh, stride_qt, head * DK, DK
    elif head < 2 * HK:
        x_ptr, stride, channel, size = k_ptr + (head - HK) * stride_kh, stride_kt, head * DK, DK
    else:
        value = head - 2 * HK
        x_ptr, stride = v_ptr + value // R * stride_vh + value % R * stride_vr, stride_vt
        channel, size = 2 * HK * DK + value * DV, DV
    return x_ptr, stride, channel, size


@triton.jit
def delta_conv_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, conv_ptr, weight_ptr, chunks_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output `[T, C]` of one chunk and head; `conv_ptr` is None where rows begin."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(chunks_ptr + chunk * 4).to(tl.int64)
    first = tl.load(chunks_ptr + chunk * 4 + 1).to(tl.int64)
    count = tl.load(chunks_ptr + chunk * 4 + 2)
    begin = tl.load(chunks_ptr + chunk * 4 + 3).to(tl.int64)
    x_ptr, stride, channel, size = _input_of(
        head, q_ptr, k_ptr, v_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr, HK, R, DK, DV
    )
    channels: tl.constexpr = HK * (2 * DK + R * DV)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    ok_d = d < size
    ok = (t < count)[:, None] & ok_d[None, :]  # [BLOCK_T, BLOCK_D]
    of = channel + d
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tap in tl.static_range(KERNEL):
        at = first + t - (KERNEL - 1) + tap
        inside = (at >= begin)[:, None]
        x = tl.load(x_ptr + at[:, None] * stride + d[None, :], mask=ok & inside, other=0.0)
        if conv_ptr is not None:
            before = (row * channels + of)[None, :] * KERNEL + (KERNEL + at - begin)[:, None]
            x = tl.where(inside, x, tl.load(conv_ptr + before, mask=ok & (at < begin)[:, None], other=0.0))
        weight = tl.load(weight_ptr + of * KERNEL + tap, mask=ok_d, other=0.0)
        total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (total * tl.sigmoid(total)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (first + t)[:, None] * channels + of[None, :], out, mask=ok)


@triton.jit
def conv_tail_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, conv_ptr, begins_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last KERNEL inputs of a row and the channels of one head, oldest first: `[B, C, KERNEL]`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(begins_ptr + row).to(tl.int64), tl.load(begins_ptr + row + 1).to(tl.int64)
    x_ptr, stride, channel, size = _input_of(
        head, q_ptr, k_ptr, v_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr, HK, R, DK, DV
    )
    d = tl.arange(0, BLOCK_D)
    ok = d < size
    of = (row * (HK * (2 * DK + R * DV)) + channel + d) * KERNEL
    for tap in tl.static_range(KERNEL):
        at = end - KERNEL + tap
        x = tl.load(x_ptr + at * stride + d, mask=ok & (at >= begin), other=0.0)
        if conv_ptr is not None:
            x = tl.where(at >= begin, x, tl.load(conv_ptr + of + KERNEL + at - begin, mask=ok & (at < begin), other=0.0))
        tl.store(out_ptr + of + tap, x, mask=ok)


def delta_conv(x: DeltaInputs, weights: DeltaWeights, chunks: Chunks, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Several tokens a row, packed.

    Args:
        x: of T tokens, for which `check_delta` has no objection.
        conv: `[B, C, K]` last inputs of the rows, oldest first; None where all rows begin.

    Returns:
        `[T, C]` in the dtype of x, and the last inputs after it, `[B, C, K]`.
    """
    tokens, heads, shared, dim = x.v.shape
    channels, size = weights.conv.shape
    out, tail = x.v.new_empty(tokens, channels), x.v.new_empty(len(chunks.begins) - 1, channels, size)
    strides = (*x.q.stride()[:2], *x.k.stride()[:2], *x.v.stride()[:3])
    sizes = {"HK": heads, "R": shared, "DK": x.q.shape[-1], "DV": dim, "KERNEL": size}
    block, all_heads = power_of_2(max(x.q.shape[-1], dim)), heads * (2 + shared)
    with on_device_of(out):
        launch(
            delta_conv_kernel, (len(chunks.chunks), all_heads),
            (x.q, x.k, x.v, out, conv, weights.conv, chunks.chunks, *strides),
            dict(**sizes, BLOCK_T=chunks.size, BLOCK_D=block, num_warps=8),
        )  # fmt: skip
        launch(
            conv_tail_kernel, (tail.shape[0], all_heads), (x.q, x.k, x.v, tail, conv, chunks.begins, *strides),
            dict(**sizes, BLOCK_D=block, num_warps=1),
        )  # fmt: skip
    return out, tail
