"""Gated DeltaNet over the packed rows of a prompt: chunk by chunk, by matrix products.

Behind the convolution (`delta_conv.py`) two launches compute `by_chunks` of `delta_reference.py`: `delta_chunk_kernel`, all
chunks at once, what each changes apart from the state it begins with (U and W of the WY representation);
`delta_scan_kernel`, for each row and value head one chunk after the other, the outputs and the states in between, which
never leave the processor. Then the gated RMSNorm. Tokens are packed, so that padding is neither read nor computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of
from hf_fastattn.kernels.linear.delta_chunks import Chunks, chunks_of
from hf_fastattn.kernels.linear.delta_conv import delta_conv
from hf_fastattn.kernels.linear.delta_norm import gated_norm
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights
from hf_fastattn.kernels.linear.delta_reference import NORM_EPS
from hf_fastattn.kernels.linear.delta_step import check_delta
from hf_fastattn.kernels.quick_launch import launch

# Matrix products take no fewer columns.
LEAST = 16
# Columns of a state that a program of the scan holds.
COLUMNS = 32


@triton.jit
def _inverse(system, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of I + system, which is strictly lower triangular, `[ROWS, ROWS]`.

    The two blocks on the diagonal by substitution, both at once; what is left, below them, by products.
    """
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    BLOCK: tl.constexpr = ROWS // 2
    same = i // BLOCK == j // BLOCK
    diagonal, below = tl.where(same, system, 0.0), tl.where(same, 0.0, system)
    inverse = tl.where(i == j, 1.0, 0.0)
    for row in range(1, BLOCK):
        factors = tl.sum(tl.where(i % BLOCK == row, diagonal, 0.0), 0)  # [ROWS], by column
        change = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where((i % BLOCK == row) & same, inverse - change[None, :], inverse)
    left = tl.dot(inverse, below, input_precision=PRECISION)
    return inverse - tl.dot(left, inverse, input_precision=PRECISION)


@triton.jit
def delta_chunk_kernel(
    mixed_ptr, b_ptr, a_ptr, a_log_ptr, dt_bias_ptr, changes_ptr, weights_ptr, total_ptr, chunks_ptr,
    stride_bt, stride_bh, stride_br, stride_at, stride_ah, stride_ar,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, NORM_EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """U `[T, HV, DV]`, W `[T, HV, DK]` and the running sum of g `[T, HV]`, all fp32, of one chunk and value head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(chunks_ptr + chunk * 4 + 1).to(tl.int64), tl.load(chunks_ptr + chunk * 4 + 2)
    group, member = head // R, head % R
    t, dk, dv = tl.arange(0, ROWS), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    ok, at = t < count, first + t
    ok_k, ok_v = ok[:, None] & (dk < DK)[None, :], ok[:, None] & (dv < DV)[None, :]
    channels: tl.constexpr = HK * (2 * DK + R * DV)
    of = at[:, None] * channels
    k = tl.load(mixed_ptr + of + HK * DK + group * DK + dk[None, :], mask=ok_k, other=0.0).to(tl.float32)
    k *= tl.rsqrt(tl.sum(k * k, 1) + NORM_EPS)[:, None]
    b = tl.load(b_ptr + at * stride_bt + group * stride_bh + member * stride_br, mask=ok, other=0.0)
    a = tl.load(a_ptr + at * stride_at + group * stride_ah + member * stride_ar, mask=ok, other=0.0).to(tl.float32)
    beta = tl.where(ok, tl.sigmoid(b.to(tl.float32)).to(b.dtype).to(tl.float32), 0.0)
    a += tl.load(dt_bias_ptr + head).to(tl.float32)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    g = tl.where(ok, -tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * softplus, 0.0)
    total = tl.cumsum(g, 0)
    earlier = t[:, None] > t[None, :]
    decay = tl.exp(tl.where(earlier, total[:, None] - total[None, :], float("-inf")))
    system = tl.dot(k * beta[:, None], tl.trans(k), input_precision=PRECISION) * decay
    inverse = _inverse(system, ROWS, EXACT)
    v = tl.load(mixed_ptr + of + 2 * HK * DK + head * DV + dv[None, :], mask=ok_v, other=0.0).to(tl.float32)
    changes = tl.dot(inverse, v * beta[:, None], input_precision=PRECISION)
    weights = tl.dot(inverse, k * (beta * tl.exp(total))[:, None], input_precision=PRECISION)
    out = (at * (HK * R) + head)[:, None]
    tl.store(changes_ptr + out * DV + dv[None, :], changes, mask=ok_v)
    tl.store(weights_ptr + out * DK + dk[None, :], weights, mask=ok_k)
    tl.store(total_ptr + at * (HK * R) + head, total, mask=ok)


@triton.jit
def delta_scan_kernel(
    mixed_ptr, changes_ptr, weights_ptr, total_ptr, state_ptr, out_ptr, state_out_ptr, begins_ptr, scale,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, NORM_EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs `[T, HV, DV]` and last states of one row, value head and BLOCK_V columns; `state_ptr` None: zero states."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = tl.load(begins_ptr + row), tl.load(begins_ptr + row + 1)
    t, dk, dv = tl.arange(0, ROWS), tl.arange(0, BLOCK_K), block * BLOCK_V + tl.arange(0, BLOCK_V)
    channels: tl.constexpr = HK * (2 * DK + R * DV)
    ok_s = (dk < DK)[:, None] & (dv < DV)[None, :]
    within = (row * (HK * R) + head) * (DK * DV) + dk[:, None] * DV + dv[None, :]
    if state_ptr is not None:
        state = tl.load(state_ptr + within, mask=ok_s, other=0.0)
    else:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for first in range(begin, end, ROWS):
        at = (first + t).to(tl.int64)
        ok = first + t < end
        ok_k, ok_v = ok[:, None] & (dk < DK)[None, :], ok[:, None] & (dv < DV)[None, :]
        of = at[:, None] * channels + head // R * DK + dk[None, :]
        q = tl.load(mixed_ptr + of, mask=ok_k, other=0.0).to(tl.float32)
        k = tl.load(mixed_ptr + of + HK * DK, mask=ok_k, other=0.0).to(tl.float32)
        q *= tl.rsqrt(tl.sum(q * q, 1) + NORM_EPS)[:, None] * scale
        k *= tl.rsqrt(tl.sum(k * k, 1) + NORM_EPS)[:, None]
        token = at * (HK * R) + head
        total = tl.load(total_ptr + token, mask=ok, other=0.0)
        last = tl.load(total_ptr + (tl.minimum(first + ROWS, end) - 1).to(tl.int64) * (HK * R) + head)
        weights = tl.load(weights_ptr + token[:, None] * DK + dk[None, :], mask=ok_k, other=0.0)
        changes = tl.load(changes_ptr + token[:, None] * DV + dv[None, :], mask=ok_v, other=0.0)
        changes -= tl.dot(weights, state, input_precision=PRECISION)
        seen = (t[:, None] >= t[None, :]) & ok[:, None]
        decay = tl.exp(tl.where(seen, total[:, None] - total[None, :], float("-inf")))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
        out = tl.dot(q * tl.exp(total)[:, None], state, input_precision=PRECISION)
        out += tl.dot(scores, changes, input_precision=PRECISION)
        tl.store(out_ptr + token[:, None] * DV + dv[None, :], out.to(out_ptr.dtype.element_ty), mask=ok_v)
        k *= tl.exp(last - total)[:, None]
        state = state * tl.exp(last) + tl.dot(tl.trans(k), changes, input_precision=PRECISION)
    tl.store(state_out_ptr + within, state, mask=ok_s)


def delta_prefill(
    x: DeltaInputs,
    weights: DeltaWeights,
    lengths: Sequence[int],
    conv: Tensor | None = None,
    recurrent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several tokens a row, packed; arguments and results as of `delta_reference.delta_prefill`.

    Raises:
        ValueError: shapes or dtypes do not fit each other or the kernels.
    """
    check_delta(x, weights)
    tokens, heads, shared, dv = x.v.shape
    dk, rows, all_heads = x.q.shape[-1], len(lengths), heads * shared
    if sum(lengths) != tokens:
        raise ValueError(f"lengths {list(lengths)} must add up to {tokens} tokens")
    chunks = chunks_of(lengths, x.v.device, x.v.dtype)
    mixed, tail = delta_conv(x, weights, chunks, conv)
    out = x.v.new_empty(tokens, all_heads, dv)
    after = torch.empty(rows, all_heads, dk, dv, dtype=torch.float32, device=out.device)
    _rule(x, weights, chunks, mixed, recurrent, out, after)
    return gated_norm(out, x.z, weights.norm, weights.eps), tail, after


def _rule(
    x: DeltaInputs, weights: DeltaWeights, chunks: Chunks, mixed: Tensor, before: Tensor | None, out: Tensor, after: Tensor
) -> None:
    tokens, heads, shared, dv = x.v.shape
    dk, all_heads = x.q.shape[-1], heads * shared
    changes, total = (torch.empty(tokens, all_heads, *more, dtype=torch.float32, device=out.device) for more in ((dv,), ()))
    changing = torch.empty(tokens, all_heads, dk, dtype=torch.float32, device=out.device)
    # A product in TF32 errs as much as rounding to fp16, and several follow one another.
    narrow = out.dtype == torch.bfloat16
    sizes = {
        "HK": heads, "R": shared, "DK": dk, "DV": dv, "NORM_EPS": NORM_EPS, "ROWS": chunks.size, "BLOCK_K": max(dk, LEAST),
        "PRECISION": "tf32" if narrow else "tf32x3",
    }  # fmt: skip
    with on_device_of(out):
        launch(
            delta_chunk_kernel, (len(chunks.chunks), all_heads),
            (
                mixed, x.b, x.a, weights.a_log, weights.dt_bias, changes, changing, total, chunks.chunks,
                *x.b.stride(), *x.a.stride(),
            ),
            dict(**sizes, BLOCK_V=max(dv, LEAST), EXACT="tf32x3", num_warps=4),
        )  # fmt: skip
        columns = max(min(dv, COLUMNS if narrow else LEAST), LEAST)
        launch(
            delta_scan_kernel, (-(-dv // columns), all_heads, len(after)),
            (mixed, changes, changing, total, before, out, after, chunks.begins, float(dk**-0.5)),
            dict(**sizes, BLOCK_V=columns, num_warps=4, num_stages=2 if narrow else 1),
        )  # fmt: skip
