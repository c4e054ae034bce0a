"""Products of few tokens with up to three quantised weights in one launch, from the library's own storage.

`y_i = x W_i^T + b_i`, or `silu(x Wg^T) * (x Wu^T)`, as in `layer/matvec.py`: summed in fp32, and rounded once after bias and
residual are added. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.quantised.codes_row import CodePointers, codes_row_kernel
from hf_fastattn.kernels.quantised.configs import codes_tile, ints_tile, tiles_tile
from hf_fastattn.kernels.quantised.ints_row import IntPointers, ints_row_kernel
from hf_fastattn.kernels.quantised.nibbles import factor_of
from hf_fastattn.kernels.quantised.tiles_row import TilePointers, tiles_row_kernel
from hf_fastattn.kernels.quantised.weights import BlockCodes, QuantisedWeight, RowInts, TiledInts, why_not_weight
from hf_fastattn.kernels.rehearsal import prepared

MOST_WEIGHTS = 3


def most_tokens(weight: QuantisedWeight) -> int:
    """Up to how many tokens the products are ours."""
    return 1


def alike(weights: Sequence[QuantisedWeight]) -> bool:
    """Whether one launch takes all of the weights."""
    return len({_format(weight) for weight in weights}) == 1


def _format(weight: QuantisedWeight) -> tuple[Any, ...]:
    if isinstance(weight, BlockCodes):
        return BlockCodes, weight.columns, weight.kind, weight.block, weight.nested is None
    if isinstance(weight, TiledInts):
        return TiledInts, weight.columns, weight.group
    return RowInts, weight.columns, weight.scales.dtype, weight.factor


def _check(x: Tensor, weights: Sequence[QuantisedWeight], biases: Sequence[Tensor] | None, residual: Tensor | None) -> None:
    if not 1 <= len(weights) <= MOST_WEIGHTS or (biases is not None and len(biases) != len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases or ())} biases; expected 1 to 3, a bias for each or none")
    if not alike(weights):
        raise ValueError(f"weights of {[_format(weight) for weight in weights]} must be alike; take a launch for each")
    first, k = weights[0], weights[0].columns
    for weight in weights:
        reason = why_not_weight(weight, x.device)
        if reason is not None:
            raise ValueError(f"{reason}; see `weights.py` for what kernels read")
    fits = x.ndim == 2 and (k - 1024 < x.shape[1] <= k if isinstance(first, TiledInts) else x.shape[1] == k)
    dtypes = (torch.bfloat16,) if isinstance(first, TiledInts) else DTYPES
    if not fits or x.dtype not in dtypes or x.stride(1) != 1 or x.shape[0] > most_tokens(first):
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, strides {x.stride()}, must be [T, {k}] with T up to {most_tokens(first)}, "
            f"contiguous in its last dimension, of a dtype among {dtypes}"
        )
    for weight, bias in zip(weights, biases or (), strict=False):
        if bias.shape != (weight.rows,) or not bias.is_contiguous():
            raise ValueError(f"bias {tuple(bias.shape)} must be [N] = {[weight.rows]} and contiguous")
    if residual is not None and (
        len(weights) != 1
        or residual.shape != (x.shape[0], first.rows)
        or residual.dtype not in (x.dtype, torch.float32)
        or residual.stride(1) != 1
    ):
        raise ValueError(
            f"residual {tuple(residual.shape)}, {residual.dtype}, must be as the output of a single weight, {x.dtype} or fp32"
        )


def _product(
    x: Tensor, weights: Sequence[QuantisedWeight], biases: Sequence[Tensor] | None, residual: Tensor | None,
    gated: bool, weights_settled: bool,
) -> Tensor:  # fmt: skip
    """All products side by side in `[T, rows of all weights]`, or `[T, rows of one weight]` if gated."""
    _check(x, weights, biases, residual)
    counts = [weight.rows for weight in weights]
    dtype = x.dtype if residual is None else residual.dtype
    y = torch.empty(x.shape[0], counts[0] if gated else sum(counts), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    counts += [0] * (MOST_WEIGHTS - len(counts))
    used = 1 if gated else len(weights)
    held = [_pointers(weight) for weight in weights]
    held += [held[0]] * (MOST_WEIGHTS - len(held))
    added = [*biases, *[None] * (MOST_WEIGHTS - len(biases))] if biases else [None] * MOST_WEIGHTS
    overlap = overlaps_launches(arch_of(x.device))
    kernel, rows, sizes = _launch_of(weights[0], gated, x.dtype)
    if isinstance(weights[0], TiledInts):
        sizes["columns"] = x.shape[1]
    # Not `triton.cdiv`, which costs the host a microsecond a call.
    programs = sum(-(-count // rows) for count in counts[:used])
    with on_device_of(x):
        prepared(kernel)[(programs,)](
            x, *held, *added, y, residual, *counts, WEIGHTS=used, GATED=gated, SETTLED=weights_settled, OVERLAP=overlap,
            **sizes, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y


def _pointers(weight: QuantisedWeight) -> Any:
    if isinstance(weight, BlockCodes):
        of = weight.nested
        nested = (None, None, None) if of is None else (of.absmax, of.levels, of.offset)
        return CodePointers(weight.codes.view(torch.int32), weight.absmax, *nested)
    if isinstance(weight, TiledInts):
        return TilePointers(weight.words, weight.scales)
    return IntPointers(weight.integers, weight.scales)


def _launch_of(weight: QuantisedWeight, gated: bool, dtype: torch.dtype) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, rows of a weight that a program takes, and its sizes."""
    k = weight.columns
    if isinstance(weight, BlockCodes):
        tile = codes_tile(k, gated)
        own = {
            "BLOCK": weight.block, "KIND": weight.kind, "NESTED": weight.nested is not None,
            "FACTOR": factor_of(weight.kind, dtype), "BLOCK_N": tile.rows, "BLOCK_W": tile.columns,
        }  # fmt: skip
        kernel, rows = codes_row_kernel, tile.rows
    elif isinstance(weight, TiledInts):
        tile = tiles_tile(k, gated)
        own = {"GROUP": weight.group, "TILES": tile.rows, "BLOCKS": tile.columns}
        kernel, rows = tiles_row_kernel, 8 * tile.rows
    else:
        tile = ints_tile(k, gated)
        own = {"FACTOR": weight.factor, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns}
        kernel, rows = ints_row_kernel, tile.rows
    return kernel, rows, {"K": k, "STAGES": tile.stages, "num_warps": tile.warps, **own}


def matvec(
    x: Tensor,
    weights: Sequence[QuantisedWeight],
    biases: Sequence[Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    weights_settled: bool = False,
) -> tuple[Tensor, ...]:
    """`x W^T + b` for up to three quantised weights in one launch.

    Args:
        x: `[T, K]` bf16, fp16 or fp32, T up to `most_tokens`; bf16 for tinygemm's tiles, and there without columns that only
            pad the weights.
        weights: each `[N_i, K]`, all alike (`alike`).
        biases: `[N_i]` for each weight, or none at all.
        residual: `[T, N]` of the dtype of x or fp32, added to the product of a single weight.
        weights_settled: see `layer.matvec.matvec`.

    Returns:
        `[T, N_i]` of each weight in the dtype of the residual, or else of x; views of one tensor `[T, N_0 + N_1 + N_2]`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    y = _product(x, weights, biases, residual, False, weights_settled)
    return y.split([weight.rows for weight in weights], -1)


def gate_up_silu(x: Tensor, gate: QuantisedWeight, up: QuantisedWeight, *, weights_settled: bool = False) -> Tensor:
    """`silu(x Wg^T) * (x Wu^T)`, `[T, I]`, in one launch; arguments as of `matvec`, both weights `[I, K]`."""
    if gate.rows != up.rows:
        raise ValueError(f"gate of {gate.rows} rows and up of {up.rows} must be of one shape")
    return _product(x, (gate, up), None, None, True, weights_settled)
