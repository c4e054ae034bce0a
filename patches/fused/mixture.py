"""The launches of a layer's mixture of experts: norm, router, shared expert, experts, the last with the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import get_rank

from hf_fastattn.kernels.experts.configs import FEW_TOKENS
from hf_fastattn.kernels.experts.mixture import mixture
from hf_fastattn.kernels.experts.router import route
from hf_fastattn.kernels.layer.matvec import gate_up_silu, matvec
from hf_fastattn.parallel.peer_memory import Delta
from hf_fastattn.patches.fused.experts import HeldExperts
from hf_fastattn.patches.fused.products import Products
from hf_fastattn.patches.modules.plain_modules import is_plain, is_silu, linear_parameters


def add_mixture(
    block: Any, held: HeldExperts, norm: Any, x: Tensor, delta: Delta, products: Products
) -> tuple[Tensor, Delta]:
    """The residual stream with the block's output in it, or as it was and the output beside it.

    Args:
        block: which `held` is of.
        norm: before it, of `x + delta`.
    """
    normed, x = products.norm(norm, x, delta)
    # A norm that was called may have given another dtype.
    if normed.dtype is not held.down.dtype or x.dtype is not normed.dtype:
        return x, products.call(block, normed)
    if held.group is None:
        return mixed(held, normed, products, x), None
    return x, products.summed_part(lambda out: _mixture(held, normed, products, out=out), held.group, normed)


def mixed(held: HeldExperts, normed: Tensor, products: Products, residual: Tensor | None = None) -> Tensor:
    """What a block that holds `held`, whole, makes of `normed: [T, H]`, with the residual stream if it is given."""
    return _mixture(held, normed, products, residual=residual)


def _mixture(
    held: HeldExperts, normed: Tensor, products: Products, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The same, or this rank's part of it, to `out` if it is given."""
    kinds = products.names.mixture
    assert kinds is not None
    options: dict[str, Any] = {"sums": products.split_sums(), "weights_settled": True}
    # A shared expert is whole on every rank, and is to be in the sum once.
    adds_shared = held.shared is not None and (held.group is None or get_rank(held.group) == 0)
    routing = route(
        normed,
        held.router,
        held.top_k,
        normalise=held.normalise,
        rounds_weights=kinds.rounds_weights,
        gate_weight=held.gate if adds_shared else None,
        **options,
    )
    shared = _shared_expert(held.shared, normed, products) if adds_shared else None
    options |= {"residual": residual, "shared": shared, "hopper": products.hopper, "out": out}
    return mixture(normed, routing, held.gate_up, held.down, **options)


def _shared_expert(mlp: Any, x: Tensor, products: Products) -> Tensor:
    """What a shared expert makes of `x: [T, H]`, before its gate."""
    plain = is_plain(mlp, products.names.mlp, x.device) and is_silu(mlp._modules.get("act_fn"), x.device)
    if products.tokens > FEW_TOKENS or not plain:
        return products.call(mlp, x)
    found = [linear_parameters(mlp._modules[name], x.device, (x.dtype,)) for name in ("gate_proj", "up_proj", "down_proj")]
    weights = [linear[0] for linear in found if linear is not None and linear[1] is None]
    if len(weights) < len(found):
        return products.call(mlp, x)
    options: dict[str, Any] = {"sums": products.split_sums(), "weights_settled": True}
    return matvec(gate_up_silu(x, weights[0], weights[1], **options), weights[2:], **options)[0]
