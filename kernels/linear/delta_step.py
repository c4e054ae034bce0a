"""A decode step of Gated DeltaNet in one launch: from the projections' output to the input of the output projection.

Convolution, SiLU, l2-norms, gates, the delta rule and the gated RMSNorm of `delta_reference.py`. A program takes some
columns of the state `[DK, DV]` of a row's value head, reads and writes them once, and makes both sums over them of what it
has read:

    o = S_t^T q = alpha S_{t-1}^T q + (k.q) change        change = beta (v - alpha S_{t-1}^T k)

The last program of a head to arrive normalises what all of them left. All programs of one key head convolve its q and k each
for itself. In place they all write the new input of the
convolution where the oldest one lay, which none of them reads any more: hence a ring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights, StepStates
from hf_fastattn.kernels.linear.delta_reference import NORM_EPS
from hf_fastattn.kernels.linear.delta_sizes import why_not_sizes
from hf_fastattn.kernels.quick_launch import launch

# Elements of a state that a warp holds.
ELEMENTS_PER_WARP = 1024
MOST_WARPS = 8
# Columns of a state that a program takes: few while there are fewer programs than processors hold.
FEW_COLUMNS, COLUMNS = 32, 64
FEW_PROGRAMS = 256


@triton.jit
def _earlier(conv_ptr, weight_ptr, channel, ok, oldest, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Inputs of the convolution so far, and the weights of what each place holds with the new one; `[TAPS, channels]`."""
    # Places are axis 0: after a sum over axis 1 the compiler would move the state to the layout of the channels.
    place = tl.arange(0, TAPS)[:, None]
    at = channel[None, :] * KERNEL  # [1, channels]
    past = tl.load(conv_ptr + at + place, mask=ok & (place < KERNEL), other=0.0)
    age = (place + KERNEL - 1 - oldest) % KERNEL
    return past, tl.load(weight_ptr + at + age, mask=place < KERNEL, other=0.0)


@triton.jit
def _convolved(
    x, past, weight, conv_out_ptr, channel, ok, oldest, KERNEL: tl.constexpr, TAPS: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution of channels whose new inputs are x; writes the inputs that the next step reads."""
    place = tl.arange(0, TAPS)[:, None]
    at = channel[None, :] * KERNEL
    inputs = tl.where(place == oldest, x[None, :], past)
    if IN_PLACE:
        tl.store(conv_out_ptr + at + place, inputs, mask=ok & (place == oldest))
    else:
        age = (place + KERNEL - 1 - oldest) % KERNEL
        tl.store(conv_out_ptr + at + age, inputs, mask=ok & (place < KERNEL))
    total = tl.sum(inputs.to(tl.float32) * weight.to(tl.float32), 0).to(x.dtype).to(tl.float32)
    return (total * tl.sigmoid(total)).to(x.dtype).to(tl.float32)


@triton.jit
def _normalise(read, z, scales, out_ptr, eps, DV: tl.constexpr):
    """Store `scales * RMSNorm(read) * silu(z)`; zero for what is zero."""
    wide = read.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / DV + eps)).to(read.dtype)
    tl.store(out_ptr, ((scales * normed).to(tl.float32) * (z * tl.sigmoid(z))).to(read.dtype))


@triton.jit
def delta_step_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, b_ptr, a_ptr, out_ptr,
    conv_ptr, state_ptr, slots_ptr, conv_out_ptr, state_out_ptr, slots_out_ptr, seq_lens_ptr, arrived_ptr,
    weight_ptr, a_log_ptr, dt_bias_ptr, norm_ptr, eps, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_vr, stride_zt, stride_zh, stride_zr,
    stride_bt, stride_bh, stride_br, stride_at, stride_ah, stride_ar,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr,
    TAPS: tl.constexpr, IN_PLACE: tl.constexpr, NORM_EPS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one value head of one row; q and k are those of key head `head // R`."""
    PARTS: tl.constexpr = DV // COLUMNS
    head, part, row = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    group, member = head // R, head % R
    dk, dv, every = tl.arange(0, DK), part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DV)
    # Slots and states are those of an earlier forward: they are read while launches of this one may still run.
    slot = tl.load(slots_ptr + row).to(tl.int64)
    slot_out = slot if IN_PLACE else tl.load(slots_out_ptr + row).to(tl.int64)
    ok, oldest = slot >= 0, 0
    if IN_PLACE:
        oldest = tl.load(seq_lens_ptr + row) % KERNEL
    within = head * DK * DV + dk[:, None] * DV + dv[None, :]  # [DK, COLUMNS]
    state = tl.load(state_ptr + slot * (HK * R * DK * DV) + within, mask=ok, other=0.0)
    forget = tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    scales = tl.load(norm_ptr + every)
    channels: tl.constexpr = HK * (2 * DK + R * DV)
    conv_ptr += slot * channels * KERNEL
    conv_out_ptr += slot_out * channels * KERNEL
    of_q, of_k, of_v = group * DK + dk, HK * DK + group * DK + dk, 2 * HK * DK + head * DV + dv
    past_q, weight_q = _earlier(conv_ptr, weight_ptr, of_q, ok, oldest, KERNEL, TAPS)
    past_k, weight_k = _earlier(conv_ptr, weight_ptr, of_k, ok, oldest, KERNEL, TAPS)
    past_v, weight_v = _earlier(conv_ptr, weight_ptr, of_v, ok, oldest, KERNEL, TAPS)
    if OVERLAP:
        gdc_wait()
    q = tl.load(q_ptr + row * stride_qt + group * stride_qh + dk)  # [DK]
    k = tl.load(k_ptr + row * stride_kt + group * stride_kh + dk)  # [DK]
    v = tl.load(v_ptr + row * stride_vt + group * stride_vh + member * stride_vr + dv)  # [COLUMNS]
    z = tl.load(z_ptr + row * stride_zt + group * stride_zh + member * stride_zr + every).to(tl.float32)  # [DV]
    b = tl.load(b_ptr + row * stride_bt + group * stride_bh + member * stride_br)
    a = tl.load(a_ptr + row * stride_at + group * stride_ah + member * stride_ar).to(tl.float32) + bias
    if OVERLAP:
        gdc_launch_dependents()

    q = _convolved(q, past_q, weight_q, conv_out_ptr, of_q, ok, oldest, KERNEL, TAPS, IN_PLACE)
    k = _convolved(k, past_k, weight_k, conv_out_ptr, of_k, ok, oldest, KERNEL, TAPS, IN_PLACE)
    wide = _convolved(v, past_v, weight_v, conv_out_ptr, of_v, ok, oldest, KERNEL, TAPS, IN_PLACE)
    q *= tl.rsqrt(tl.sum(q * q, 0) + NORM_EPS) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + NORM_EPS)
    beta = tl.sigmoid(b.to(tl.float32)).to(b.dtype).to(tl.float32)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    alpha = tl.exp(-forget * softplus)

    change = (wide - alpha * tl.sum(state * k[:, None], 0)) * beta  # [COLUMNS]
    read = alpha * tl.sum(state * q[:, None], 0) + tl.sum(k * q, 0) * change  # [COLUMNS]
    state = state * alpha + k[:, None] * change[None, :]
    tl.store(state_out_ptr + slot_out * (HK * R * DK * DV) + within, state, mask=ok)

    number = row * (HK * R) + head
    out_ptr += number * DV
    read = tl.where(ok, read, 0.0).to(v.dtype)
    if PARTS == 1:
        _normalise(read, z, scales, out_ptr + every, eps, DV)
    else:
        tl.store(out_ptr + dv, read)
        # Every thread has stored its share before one of them counts it.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + number, 1, sem="acq_rel", scope="gpu")
        if arrived == PARTS - 1:
            tl.store(arrived_ptr + number, 0)
            # .cg bypasses the L1 cache, which may hold values from before another program wrote.
            _normalise(tl.load(out_ptr + every, cache_modifier=".cg"), z, scales, out_ptr + every, eps, DV)


def columns_of(heads: int, dim: int) -> int:
    """Columns of a state that a program takes, where there are so many value heads in all rows."""
    return min(dim, FEW_COLUMNS if heads < FEW_PROGRAMS else COLUMNS)


def why_not_delta(x: DeltaInputs, weights: DeltaWeights) -> str | None:
    """Why the kernels cannot take a layer; None if they can."""
    reason = why_not_sizes(x.q.shape[-1], x.v.shape[-1], weights.conv.shape[1])
    if reason is not None:
        return reason
    if x.v.dtype not in DTYPES or any(part.dtype is not x.v.dtype for part in (*x, weights.conv)):
        return f"projections of {[part.dtype for part in x]} and a convolution in {weights.conv.dtype}"
    if any(part.stride(-1) != 1 for part in (x.q, x.k, x.v, x.z)):
        return "projections that are not contiguous in their last dimension"
    return None


def check_delta(x: DeltaInputs, weights: DeltaWeights) -> None:
    """Raise a `ValueError` unless inputs and weights fit each other and the kernels."""
    reason = why_not_delta(x, weights)
    if reason is not None:
        raise ValueError(f"{reason}; use the reference")
    tokens, heads, shared, dim = x.v.shape
    channels = heads * (2 * x.q.shape[-1] + shared * dim)
    if x.q.shape != x.k.shape or x.q.shape[:2] != (tokens, heads) or weights.conv.shape[0] != channels:
        raise ValueError(
            f"q {tuple(x.q.shape)} and k {tuple(x.k.shape)} must be [T, HK, DK] for v {tuple(x.v.shape)}, "
            f"[T, HK, R, DV], and conv {tuple(weights.conv.shape)} [2 HK DK + HK R DV, K]"
        )


def delta_step(
    x: DeltaInputs,
    weights: DeltaWeights,
    states: StepStates,
    arrived: Tensor | None = None,
    *,
    columns: int | None = None,
) -> Tensor:
    """One token a row.

    Args:
        x: of T rows.
        weights: contiguous.
        states: of the rows; those after the step are written, of rows with a slot.
        arrived: `[T * HV]` int32 zeros, which the launch leaves so; made by the call if needed and not given.
        columns: of a state that a program takes, for measuring; a power of two.

    Returns:
        `[T, HV * DV]`, zero for rows without a slot.

    Raises:
        ValueError: shapes or dtypes do not fit each other or the kernel.
    """
    check_delta(x, weights)
    tokens, heads, shared, dim = x.v.shape
    recurrent, in_place = states.recurrent, states.seq_lens is not None
    if recurrent.dtype is not torch.float32 or recurrent.shape[1:] != (heads * shared, x.q.shape[-1], dim):
        raise ValueError(f"states {tuple(recurrent.shape)}, {recurrent.dtype}, must be [N, HV, DK, DV] in fp32")
    if in_place and (states.recurrent_out is not recurrent or states.conv_out is not states.conv):
        raise ValueError("seq_lens is given, for states that are written in place, but these go elsewhere")
    out = x.v.new_empty(tokens, heads * shared * dim)
    overlap = overlaps_launches(arch_of(out.device))
    if columns is None:
        columns = columns_of(tokens * heads * shared, dim)
    if columns < dim and arrived is None:
        arrived = torch.zeros(tokens * heads * shared, dtype=torch.int32, device=out.device)
    warps = min(max(x.q.shape[-1] * columns // ELEMENTS_PER_WARP, 1), MOST_WARPS)
    with on_device_of(out):
        launch(
            delta_step_kernel, (heads * shared * (dim // columns), tokens),
            (
                *x, out, states.conv, recurrent, states.slots, states.conv_out, states.recurrent_out, states.slots_out,
                states.seq_lens, arrived, weights.conv, weights.a_log, weights.dt_bias, weights.norm, weights.eps,
                float(x.q.shape[-1] ** -0.5), *x.q.stride()[:2], *x.k.stride()[:2], *x.v.stride()[:3], *x.z.stride()[:3],
                *x.b.stride(), *x.a.stride(),
            ),
            dict(
                HK=heads, R=shared, DK=x.q.shape[-1], DV=dim, KERNEL=weights.conv.shape[1],
                TAPS=power_of_2(weights.conv.shape[1]), IN_PLACE=in_place, NORM_EPS=NORM_EPS,
                COLUMNS=columns, OVERLAP=overlap,
                num_warps=warps, **({"launch_pdl": True} if overlap else {}),
            ),
        )  # fmt: skip
    return out
