"""Products of few tokens with up to three quantised weights in one launch, from the library's own storage.

`y_i = x W_i^T + b_i`, or `silu(x Wg^T) * (x Wu^T)`, as in `layer/matvec.py`: summed in fp32, and rounded once after bias and
residual are added. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.configs import MOST_TOKENS
from hf_fastattn.kernels.layer.split_sums import MOST_TILES, SplitSums
from hf_fastattn.kernels.quantised.codes_row import CodePointers, codes_row_kernel
from hf_fastattn.kernels.quantised.codes_tokens import STEP, codes_tokens_kernel
from hf_fastattn.kernels.quantised.configs import codes_tile, codes_tokens_tile, ints_tile, is_quicker
from hf_fastattn.kernels.quantised.ints_row import IntPointers, ints_row_kernel
from hf_fastattn.kernels.quantised.nibbles import MATRIX_FACTORS, factor_of
from hf_fastattn.kernels.quantised.weights import BlockCodes, QuantisedWeight, RowInts, why_not_weight
from hf_fastattn.kernels.rehearsal import prepared

MOST_WEIGHTS = 3
# What `codes_tokens.py` multiplies at once lies in one block, and its steps are whole.
TOKENS_BLOCK, TOKENS_COLUMNS = 64, 128


def most_tokens(weight: QuantisedWeight, dtype: torch.dtype) -> int:
    """Up to how many tokens of `dtype` kernels multiply with a weight: many with 4-bit codes in large blocks, or one."""
    several = isinstance(weight, BlockCodes) and weight.block >= TOKENS_BLOCK and weight.columns % TOKENS_COLUMNS == 0
    return MOST_TOKENS if several and dtype is not torch.float32 else 1


def pays(weight: QuantisedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for so many tokens, and it was measured to be quicker than the library's own."""
    return tokens <= most_tokens(weight, dtype) and is_quicker(tokens)


def alike(weights: Sequence[QuantisedWeight]) -> bool:
    """Whether one launch takes all of the weights."""
    return len({_format(weight) for weight in weights}) == 1


def _format(weight: QuantisedWeight) -> tuple[Any, ...]:
    if isinstance(weight, BlockCodes):
        return BlockCodes, weight.columns, weight.kind, weight.block, weight.nested is None
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
    gated: bool, weights_settled: bool, sums: SplitSums | None,
) -> Tensor:  # fmt: skip
    """All products side by side in `[T, rows of all weights]`, or `[T, rows of one weight]` if gated."""
    _check(x, weights, biases, residual)
    counts = [weight.rows for weight in weights]
    if x.element_size() == 2 and (x.data_ptr() % 4 or x.stride(0) % 2):
        # Kernels read x two columns at a time.
        x = x.clone(memory_format=torch.contiguous_format)
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
    options = {"WEIGHTS": used, "GATED": gated, "SETTLED": weights_settled, "OVERLAP": overlap}
    if overlap:
        options["launch_pdl"] = True
    if x.shape[0] > 1:
        assert isinstance(weights[0], BlockCodes)
        _several_tokens(x, weights[0], held, added, y, residual, counts, sums, options)
        return y
    kernel, rows, sizes = _launch_of(weights[0], gated, x.dtype)
    # Not `triton.cdiv`, which costs the host a microsecond a call.
    programs = sum(-(-count // rows) for count in counts[:used])
    with on_device_of(x):
        prepared(kernel)[(programs,)](
            x, *held, *added, y, residual, *counts, **options, **sizes
        )  # fmt: skip
    return y


def _several_tokens(
    x: Tensor, like: BlockCodes, held: list[Any], added: list[Any], y: Tensor, residual: Tensor | None, counts: list[int],
    sums: SplitSums | None, options: dict[str, Any],
) -> None:  # fmt: skip
    """Fill y with the products of several tokens with weights like `like`."""
    used, gated = options["WEIGHTS"], options["GATED"]
    tile = codes_tokens_tile(sum(counts[:used]), gated)
    tiles = sum(-(-count // tile.rows) for count in counts[:used])
    step = STEP.value * tile.unrolled
    steps = -(-like.columns // 2 // step)
    # Steps a part, and then parts: rounded so that no part is empty.
    part = -(-steps // min(tile.split, steps)) if tiles <= MOST_TILES else steps
    split = -(-steps // part)
    block_t = max(power_of_2(x.shape[0]), 16)
    partial = arrived = None
    if split > 1:
        room = sums or SplitSums(x.device)
        partial = room.partial(tiles * split * tile.rows * block_t * (2 if gated else 1))
        arrived = room.arrived
    with on_device_of(x):
        prepared(codes_tokens_kernel)[(tiles, split)](
            x, *[one._replace(codes_ptr=one.codes_ptr.view(torch.uint8)) for one in held], *added, y, residual, partial,
            arrived, x.shape[0], *counts, x.stride(0), y.stride(0), 0 if residual is None else residual.stride(0),
            K=like.columns, BLOCK=like.block, KIND=like.kind, NESTED=like.nested is not None,
            FACTOR=MATRIX_FACTORS[like.kind, x.dtype], BLOCK_T=block_t, BLOCK_N=tile.rows, UNROLLED=tile.unrolled,
            STAGES=tile.stages, SPLIT=split, PART=part * step, num_warps=tile.warps, **options,
        )  # fmt: skip


def _pointers(weight: QuantisedWeight) -> Any:
    if isinstance(weight, BlockCodes):
        of = weight.nested
        nested = (None, None, None) if of is None else (of.absmax, of.levels, of.offset)
        return CodePointers(weight.codes.view(torch.int32), weight.absmax, *nested)
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
    else:
        tile = ints_tile(k, gated)
        own = {"BLOCK_N": tile.rows, "BLOCK_K": tile.columns}
        kernel, rows = ints_row_kernel, tile.rows
    return kernel, rows, {"K": k, "STAGES": tile.stages, "num_warps": tile.warps, **own}


def matvec(
    x: Tensor,
    weights: Sequence[QuantisedWeight],
    biases: Sequence[Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    weights_settled: bool = False,
    sums: SplitSums | None = None,
) -> tuple[Tensor, ...]:
    """`x W^T + b` for up to three quantised weights in one launch.

    Args:
        x: `[T, K]` bf16, fp16 or fp32, T up to `most_tokens`.
        weights: each `[N_i, K]`, all alike (`alike`).
        biases: `[N_i]` for each weight, or none at all.
        residual: `[T, N]` of the dtype of x or fp32, added to the product of a single weight.
        weights_settled: see `layer.matvec.matvec`.
        sums: room for split products of several tokens, for one stream; made by the call if needed and not given.

    Returns:
        `[T, N_i]` of each weight in the dtype of the residual, or else of x; views of one tensor `[T, N_0 + N_1 + N_2]`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    y = _product(x, weights, biases, residual, False, weights_settled, sums)
    return y.split([weight.rows for weight in weights], -1)


def gate_up_silu(
    x: Tensor, gate: QuantisedWeight, up: QuantisedWeight, *, weights_settled: bool = False, sums: SplitSums | None = None
) -> Tensor:
    """`silu(x Wg^T) * (x Wu^T)`, `[T, I]`, in one launch; arguments as of `matvec`, both weights `[I, K]`."""
    if gate.rows != up.rows:
        raise ValueError(f"gate of {gate.rows} rows and up of {up.rows} must be of one shape")
    return _product(x, (gate, up), None, None, True, weights_settled, sums)
