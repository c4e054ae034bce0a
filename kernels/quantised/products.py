"""Products of few tokens with up to three quantised weights in one launch, from the library's own storage.

`y_i = x W_i^T + b_i`, or `silu(x Wg^T) * (x Wu^T)`, as in `layer/matvec.py`: summed in fp32, and rounded once after bias and
residual are added. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.quantised.codes_matrix import PRODUCT_COLUMNS, ROWS, codes_matrix_kernel
from hf_fastattn.kernels.quantised.codes_row import CodePointers, codes_row_kernel
from hf_fastattn.kernels.quantised.configs import codes_matrix_tile, codes_tile, ints_tile, tiles_matrix_tile
from hf_fastattn.kernels.quantised.ints_row import IntPointers, ints_row_kernel
from hf_fastattn.kernels.quantised.nibbles import MATRIX_FACTORS, factor_of
from hf_fastattn.kernels.quantised.tiles_matrix import TilePointers, tiles_matrix_kernel
from hf_fastattn.kernels.quantised.weights import BlockCodes, QuantisedWeight, RowInts, TiledInts, why_not_weight
from hf_fastattn.kernels.rehearsal import prepared

MOST_WEIGHTS = 3
# Of the matrix unit: two groups of eight.
MOST_TOKENS = 16
# What kernels read at once, in bytes: addresses are multiples of it.
ALIGNED = 16


def most_tokens(weight: QuantisedWeight, dtype: torch.dtype) -> int:
    """Up to how many tokens of `dtype` kernels multiply with a weight: 16 with 4 bits on the matrix unit, one, or none."""
    if isinstance(weight, TiledInts):
        return MOST_TOKENS if dtype is torch.bfloat16 and weight.words.data_ptr() % ALIGNED == 0 else 0
    return MOST_TOKENS if isinstance(weight, BlockCodes) and _on_matrix_unit(weight, dtype) else 1


def _on_matrix_unit(weight: BlockCodes, dtype: torch.dtype) -> bool:
    whole = weight.block >= PRODUCT_COLUMNS.value and weight.codes.data_ptr() % ALIGNED == 0
    return whole and dtype is not torch.float32


def pays(weight: QuantisedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for so many tokens; all were measured to be quicker than the libraries' own."""
    return tokens <= most_tokens(weight, dtype)


def alike(weights: Sequence[QuantisedWeight]) -> bool:
    """Whether one launch takes all of the weights."""
    return len({_format(weight) for weight in weights}) == 1


def _format(weight: QuantisedWeight) -> tuple[Any, ...]:
    if isinstance(weight, BlockCodes):
        aligned = weight.codes.data_ptr() % ALIGNED == 0
        return BlockCodes, weight.columns, weight.kind, weight.block, weight.nested is None, aligned
    if isinstance(weight, TiledInts):
        return TiledInts, weight.columns, weight.group
    return RowInts, weight.columns, weight.scales.dtype


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
    if (
        x.ndim != 2
        or x.shape[1] != k
        or x.dtype not in DTYPES
        or x.stride(1) != 1
        or x.shape[0] > most_tokens(first, x.dtype)
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, strides {x.stride()}, must be [T, {k}] with T up to "
            f"{most_tokens(first, x.dtype)}, contiguous in its last dimension, of a dtype among {DTYPES}"
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
            f"residual {tuple(residual.shape)}, {residual.dtype}, must be as the output of one weight, {x.dtype} or fp32"
        )


def _product(
    x: Tensor, weights: Sequence[QuantisedWeight], biases: Sequence[Tensor] | None, residual: Tensor | None,
    gated: bool, weights_settled: bool,
) -> Tensor:  # fmt: skip
    """All products side by side in `[T, rows of all weights]`, or `[T, rows of one weight]` if gated."""
    _check(x, weights, biases, residual)
    counts = [weight.rows for weight in weights]
    if x.data_ptr() % ALIGNED or (x.shape[0] > 1 and x.stride(0) * x.element_size() % ALIGNED):
        x = x.clone(memory_format=torch.contiguous_format)
    dtype = x.dtype if residual is None else residual.dtype
    y = torch.empty(x.shape[0], counts[0] if gated else sum(counts), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    counts += [0] * (MOST_WEIGHTS - len(counts))
    used = 1 if gated else len(weights)
    overlap = overlaps_launches(arch_of(x.device))
    options = {"WEIGHTS": used, "GATED": gated, "SETTLED": weights_settled, "OVERLAP": overlap}
    if overlap:
        options["launch_pdl"] = True
    launch = _launch_of(weights, gated, x.dtype, x.shape[0])
    held = [*launch.held, *[launch.held[0]] * (MOST_WEIGHTS - len(weights))]
    added = [*biases, *[None] * (MOST_WEIGHTS - len(biases))] if biases else [None] * MOST_WEIGHTS
    # Of one token nothing is said about how many there are, and how far apart.
    several = (x.shape[0],) if launch.several else ()
    apart = (x.stride(0), y.stride(0), 0 if residual is None else residual.stride(0)) if launch.several else ()
    # Not `triton.cdiv`, which costs the host a microsecond a call.
    programs = sum(-(-count // launch.rows) for count in counts[:used])
    run = prepared(launch.kernel)
    with on_device_of(x):
        run[(programs,)](
            x, *held, *added, y, residual, *several, *counts, *apart, **options, **launch.sizes
        )  # fmt: skip
    return y


class _Launch(NamedTuple):
    """A kernel, what it reads of each weight, rows of each that a program takes, its sizes, if it takes several tokens."""

    kernel: Any
    held: list[Any]
    rows: int
    sizes: dict[str, Any]
    several: bool = False


def _launch_of(weights: Sequence[Any], gated: bool, dtype: torch.dtype, tokens: int) -> _Launch:
    first = weights[0]
    k = first.columns
    if isinstance(first, RowInts):
        tile = ints_tile(k, gated)
        sizes = {"K": k, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "STAGES": tile.stages, "num_warps": tile.warps}
        return _Launch(ints_row_kernel, [IntPointers(each.integers, each.scales) for each in weights], tile.rows, sizes)
    held: list[Any]
    # Numbers that a lane keeps, of two rows.
    sums = 2 if tokens == 1 else 4 if tokens <= MOST_TOKENS // 2 else 8
    if isinstance(first, TiledInts):
        held = [TilePointers(each.words.view(torch.int64), each.scales.view(torch.int32)) for each in weights]
        sizes = {"K": k, "GROUP": first.group, "SUMS": sums, **tiles_matrix_tile(k, gated)}
        return _Launch(tiles_matrix_kernel, held, ROWS.value, sizes, several=True)
    sizes = {"K": k, "BLOCK": first.block, "KIND": first.kind, "NESTED": first.nested is not None}
    if _on_matrix_unit(first, dtype):
        held = [_code_pointers(each, torch.int64) for each in weights]
        sizes |= {"FACTOR": MATRIX_FACTORS[first.kind, dtype], "SUMS": sums}
        sizes |= codes_matrix_tile(k, gated, sums)
        return _Launch(codes_matrix_kernel, held, ROWS.value, sizes, several=True)
    row = codes_tile(k, gated)
    sizes |= {"FACTOR": factor_of(first.kind, dtype), "BLOCK_N": row.rows, "BLOCK_W": row.columns, "STAGES": row.stages}
    held = [_code_pointers(each, torch.int32) for each in weights]
    return _Launch(codes_row_kernel, held, row.rows, {**sizes, "num_warps": row.warps})


def _code_pointers(weight: BlockCodes, words: torch.dtype) -> CodePointers:
    of = weight.nested
    nested = (None, None, None) if of is None else (of.absmax, of.levels, of.offset)
    return CodePointers(weight.codes.view(words), weight.absmax, *nested)


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
        x: `[T, K]` bf16, fp16 or fp32, T up to `most_tokens`.
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
