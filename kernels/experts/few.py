"""The experts of few tokens, two launches behind the router: gate and up with the activation, down with the weighted sum.

Weights are read as Transformers holds them, `gate_up_proj: [E, 2 I, H]` and `down_proj: [E, H, I]`, and only those of
experts that some token chose, each once. Everything is summed in fp32; states between the launches are rounded to the
dtype of x, the sum over the experts once, behind the residual. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.experts.checks import check_down, check_gate_up
from hf_fastattn.kernels.experts.configs import FEW_TOKENS, down_tile, gate_up_tile
from hf_fastattn.kernels.experts.one_token import one_down_at_once_kernel, one_down_kernel, one_gate_up_kernel
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.several_tokens import several_down_kernel, several_gate_up_kernel
from hf_fastattn.kernels.launch import arch_of, dot_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.configs import ProductTile
from hf_fastattn.kernels.layer.split_sums import MOST_TILES, SplitSums
from hf_fastattn.kernels.rehearsal import prepared

# Rows of the matrix unit's smallest tile.
BLOCK_T = 16


def gate_up_silu(x: Tensor, routing: Routing, gate_up_proj: Tensor, *, tile: ProductTile | None = None) -> Tensor:
    """`silu(gate) * up` of every pair of a token and one of its experts; see `reference.gate_up_silu`.

    Args:
        x: `[T, H]` bf16, fp16 or fp32, T up to 16, any stride between rows.
        routing: what `router.route` gave for x.
        gate_up_proj: `[E, 2 I, H]`, contiguous, of the dtype of x.
        tile: launch configuration, for measuring; by default that of `configs.gate_up_tile`.

    Returns:
        `[T, K, I]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_gate_up(x, routing, gate_up_proj, FEW_TOKENS)
    tokens, hidden = x.shape
    top_k, inner = routing.chosen.shape[1], gate_up_proj.shape[1] // 2
    y = torch.empty((tokens, top_k, inner), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    arch = arch_of(x.device)
    tile = tile or gate_up_tile(arch, x.element_size(), tokens, hidden, inner)
    options = _options(tile, hidden, inner, arch)
    tiles = -(-inner // tile.block_n)
    with on_device_of(x):
        if tokens == 1:
            prepared(one_gate_up_kernel)[(tiles, top_k)](x, gate_up_proj, routing.chosen, y, VECTOR=tile.vector, **options)
            return y
        assert routing.distinct is not None
        prepared(several_gate_up_kernel)[(tiles, routing.distinct.shape[0])](
            x, gate_up_proj, routing.chosen, routing.distinct, routing.distinct_count, y, tokens, x.stride(0),
            K=top_k, BLOCK_T=BLOCK_T, PAIRS_K=power_of_2(top_k), PRECISION=dot_precision(x.dtype), **options,
        )  # fmt: skip
    return y


def down_sum(
    states: Tensor,
    routing: Routing,
    down_proj: Tensor,
    *,
    residual: Tensor | None = None,
    shared: Tensor | None = None,
    sums: SplitSums | None = None,
    weights_settled: bool = False,
    tile: ProductTile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted sum over the experts of each token; see `reference.down_sum`.

    Args:
        states: `[T, K, I]` as `gate_up_silu` gave it.
        routing: as given there; with `gate` if `shared` is given.
        down_proj: `[E, H, I]`, contiguous, of the dtype of the states.
        residual: `[T, H]` of that dtype, added last, any stride between rows.
        shared: `[T, H]` likewise, what a shared expert made of the tokens, added times `sigmoid(gate)`.
        sums: room for split products, for one stream; made by the call if needed and not given.
        weights_settled: no launch that may still be running writes a weight, and the launch ahead is `gate_up_silu` of the
            same routing: its weights are read before that one has ended.
        tile: launch configuration, for measuring; by default that of `configs.down_tile`.
        out: `[T, H]` of that dtype, contiguous, to be written and returned.

    Returns:
        `[T, H]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_down(states, routing, down_proj, residual, shared, FEW_TOKENS)
    (tokens, top_k, inner), hidden = states.shape, down_proj.shape[1]
    if out is not None and (out.shape != (tokens, hidden) or out.dtype is not states.dtype or not out.is_contiguous()):
        raise ValueError(f"out {tuple(out.shape)}, {out.dtype}, must be {[tokens, hidden]}, {states.dtype} and contiguous")
    y = torch.empty((tokens, hidden), dtype=states.dtype, device=states.device) if out is None else out
    if not tokens:
        return y
    arch = arch_of(states.device)
    tile = tile or down_tile(arch, states.element_size(), tokens, inner, hidden, top_k)
    options = {**_options(tile, hidden, inner, arch), "K": top_k}
    tiles = -(-hidden // tile.block_n)
    gate = None if shared is None else routing.gate
    with on_device_of(states):
        if tokens == 1:
            kernel = one_down_kernel
            if tile.stages == 1 and tile.block_k >= inner:
                kernel, options["SLOTS"] = one_down_at_once_kernel, power_of_2(top_k)
                del options["STAGES"]
            prepared(kernel)[(tiles,)](
                states, down_proj, routing.chosen, routing.weights, residual, shared, gate, y,
                SETTLED=weights_settled, **options,
            )  # fmt: skip
            return y
        split = tile.split if tiles <= MOST_TILES else 1
        partial = arrived = None
        if split > 1:
            room = sums or SplitSums(states.device)
            partial, arrived = room.partial(tiles * split * tile.block_n * BLOCK_T), room.arrived
        prepared(several_down_kernel)[(tiles, split)](
            states, down_proj, routing.chosen, routing.weights, routing.distinct, routing.distinct_count,
            residual, shared, gate, y, partial, arrived, tokens, 0 if residual is None else residual.stride(0),
            0 if shared is None else shared.stride(0), SPLIT=split, BLOCK_T=BLOCK_T, PAIRS_K=power_of_2(top_k),
            PRECISION=dot_precision(states.dtype), **options,
        )  # fmt: skip
    return y


def _options(tile: ProductTile, hidden: int, inner: int, arch: int) -> dict[str, Any]:
    overlap = overlaps_launches(arch)
    return {
        "H": hidden,
        "INNER": inner,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "OVERLAP": overlap,
        "num_warps": tile.warps,
        **({"launch_pdl": True} if overlap else {}),
    }
