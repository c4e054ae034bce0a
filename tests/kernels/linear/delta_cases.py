"""Inputs, weights and states of Gated DeltaNet, with NaN wherever nothing may be read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights, StepStates

KERNEL = 4


def parts(
    tokens: int, heads: int = 2, shared: int = 2, dk: int = 8, dv: int = 16, *, interleaved: bool = False, seed: int = 0
) -> tuple[DeltaInputs, DeltaWeights]:
    """Those of `tokens` tokens in fp32; interleaved: views of one projection by key heads, as in Qwen3-Next."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if interleaved:
        qkvz, ba = normal(tokens, heads, 2 * dk + 2 * shared * dv), normal(tokens, heads, 2 * shared)
        q, k, v, z = qkvz.split((dk, dk, shared * dv, shared * dv), 2)
        b, a = ba.chunk(2, 2)
    else:
        qkv, z = normal(tokens, heads * (2 * dk + shared * dv)), normal(tokens, heads, shared * dv)
        q, k, v = qkv.split((heads * dk, heads * dk, heads * shared * dv), 1)
        q, k, v = q.unflatten(1, (heads, dk)), k.unflatten(1, (heads, dk)), v.unflatten(1, (heads, shared * dv))
        b, a = normal(tokens, heads, shared), normal(tokens, heads, shared)
    x = DeltaInputs(q, k, v.unflatten(2, (shared, dv)), z.unflatten(2, (shared, dv)), b, a)
    channels = heads * (2 * dk + shared * dv)
    weights = DeltaWeights(
        normal(channels, KERNEL), normal(heads * shared), normal(heads * shared), 1 + 0.3 * normal(dv), 1e-6
    )
    return x, weights


def in_dtype(x: DeltaInputs, weights: DeltaWeights, dtype: torch.dtype, device: Any = "cpu") -> Any:
    """The same in another dtype; what was contiguous in its last dimension still is."""
    return (
        DeltaInputs(*(part.to(device, dtype) for part in x)),
        DeltaWeights(*(part.to(device, dtype) if isinstance(part, Tensor) else part for part in weights)),
    )


def states(
    x: DeltaInputs, slots: list[int], count: int, *, slots_out: list[int] | None = None, lengths: list[int] | None = None,
    seed: int = 1,
) -> StepStates:  # fmt: skip
    """States of rows in `count` slots, the others NaN; in place if `lengths` are given, which say where the ring begins."""
    generator = torch.Generator().manual_seed(seed)
    heads, dk, (shared, dv) = x.q.shape[1], x.q.shape[2], x.v.shape[2:]
    device, dtype, wide = x.q.device, x.q.dtype, torch.float64 if x.q.dtype is torch.float64 else torch.float32
    conv = torch.randn(count, heads * (2 * dk + shared * dv), KERNEL, generator=generator)
    recurrent = torch.randn(count, heads * shared, dk, dv, generator=generator)
    free = [slot for slot in range(count) if slot not in slots]
    conv[free], recurrent[free] = math.nan, math.nan
    # As bf16 can hold them: the oracle begins with the same.
    conv, recurrent = conv.bfloat16().to(device, dtype), recurrent.to(device, wide)
    index = torch.tensor(slots, dtype=torch.int32, device=device)
    if lengths is not None:
        return StepStates(conv, recurrent, index, conv, recurrent, index, torch.tensor(lengths, device=device).int())
    out = index if slots_out is None else torch.tensor(slots_out, dtype=torch.int32, device=device)
    return StepStates(conv, recurrent, index, torch.full_like(conv, math.nan), torch.full_like(recurrent, math.nan), out)


def cloned(held: StepStates, dtype: torch.dtype | None = None) -> StepStates:
    """The same states in tensors of their own, in another dtype if it is given."""
    conv = held.conv.to(dtype or held.conv.dtype, copy=True)
    recurrent = held.recurrent.to(torch.float64 if dtype is torch.float64 else held.recurrent.dtype, copy=True)
    if held.seq_lens is not None:
        return held._replace(conv=conv, recurrent=recurrent, conv_out=conv, recurrent_out=recurrent)
    return held._replace(
        conv=conv, recurrent=recurrent, conv_out=torch.full_like(conv, math.nan),
        recurrent_out=torch.full_like(recurrent, math.nan),
    )  # fmt: skip
