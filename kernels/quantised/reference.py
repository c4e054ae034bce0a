"""Plain PyTorch: quantised weights dequantised as their libraries do, and products with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fastattn.kernels.layer import reference
from hf_fastattn.kernels.quantised.weights import NESTED_BLOCK, VALUES, BlockCodes, QuantisedWeight, TiledInts


def dequantised(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """`[N, K]`, computed in fp32 (in fp64 for fp64) and rounded to `dtype` once."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if isinstance(weight, BlockCodes):
        return _of_codes(weight, wide).to(dtype)
    if isinstance(weight, TiledInts):
        scale, offset = (part.to(wide).repeat_interleave(weight.group, 0).t() for part in weight.scales.unbind(-1))
        return ((_codes_of(weight.words).to(wide) - 8) * scale + offset)[: weight.rows].to(dtype)
    return (weight.integers.to(wide) * weight.scales.to(wide)[:, None]).to(dtype)


def _of_codes(weight: BlockCodes, wide: torch.dtype) -> Tensor:
    values = torch.tensor(VALUES[weight.kind], dtype=torch.float32, device=weight.codes.device).to(wide)
    packed = weight.codes.view(weight.rows, -1).int()
    codes = torch.stack((packed >> 4, packed & 15), -1).view(weight.rows, weight.columns)
    return values[codes] * magnitudes(weight, wide).repeat_interleave(weight.block, 1)


def _codes_of(words: Tensor) -> Tensor:
    """`[N, K]`, of tinygemm's tiles."""
    tiles, parts = words.shape[:2]
    # Columns of a word: by tile of 16 columns, its half, and their parity; the parity is the word's half.
    shifts = torch.tensor([[[0, 16], [4, 20]], [[8, 24], [12, 28]]], device=words.device)
    codes = (
        words.view(tiles, parts, 8, 4, 4, 1, 1, 1) >> shifts & 15
    )  # [tiles, parts, row, lane % 4, word, 16s, half, parity]
    return codes.permute(0, 2, 1, 4, 5, 6, 3, 7).reshape(8 * tiles, 128 * parts)


def magnitudes(weight: BlockCodes, wide: torch.dtype = torch.float32) -> Tensor:
    """`[N, K / block]`, of each block the largest."""
    found, of = weight.absmax.to(wide), weight.nested
    if of is not None:
        scales = of.absmax.to(wide).repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
        found = of.levels.to(wide)[weight.absmax.int()] * scales + of.offset.to(wide)
    return found.view(weight.rows, -1)


def matvec(
    x: Tensor,
    weights: Sequence[QuantisedWeight],
    biases: Sequence[Tensor] | None = None,
    *,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`x W^T + b` for every weight, with the residual added last, if there is one."""
    return reference.matvec(x, [dequantised(weight, x.dtype) for weight in weights], biases, residual=residual)


def gate_up_silu(x: Tensor, gate: QuantisedWeight, up: QuantisedWeight) -> Tensor:
    """`silu(x Wg^T) * (x Wu^T)`."""
    return reference.gate_up_silu(x, dequantised(gate, x.dtype), dequantised(up, x.dtype))
