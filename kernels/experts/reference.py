"""A mixture of experts in plain PyTorch: the router, the products of the chosen experts, and their weighted sum.

`y = sum_k w_k down_k(silu(gate_k(x)) * up_k(x))` over the K experts that the router chose for a token (Shazeer et al.,
2017), with weights as Transformers holds them: `gate_up_proj: [E, 2 I, H]`, `down_proj: [E, H, I]`. Only weights of chosen
experts are read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hf_fastattn.kernels.experts.routing import Routing


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    normalise: bool = True,
    scoring: str = "softmax",
    rounds_weights: bool = False,
    gate_weight: Tensor | None = None,
) -> Routing:
    """The `top_k` experts of greatest score; of experts with equal scores, those of the lowest index.

    Args:
        x: `[T, H]`.
        weight: `[E, H]`; logits are rounded to the dtype of x before anything else.
        top_k: experts a token (K).
        normalise: the weights of a token add up to 1.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        rounds_weights: the weights are rounded to the dtype of x.
        gate_weight: `[1, H]`, of the logit that gates a shared expert.
    """
    logits = functional.linear(x, weight)
    wide = logits if x.dtype == torch.float64 else logits.float()
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    values, chosen = scores.sort(dim=-1, descending=True, stable=True)
    values, chosen = values[:, :top_k], chosen[:, :top_k]
    if normalise:
        values = values / values.sum(-1, keepdim=True)
    if rounds_weights:
        values = values.to(x.dtype)
    gate = None if gate_weight is None else functional.linear(x, gate_weight)[:, 0].to(wide.dtype)
    return Routing(chosen.int(), values.to(wide.dtype), gate=gate)


def gate_up_silu(x: Tensor, routing: Routing, gate_up_proj: Tensor) -> Tensor:
    """`silu(gate) * up` of every pair of a token and one of its experts, `[T, K, I]`."""
    gate, up = _products(x[:, None].expand(-1, routing.chosen.shape[1], -1), routing, gate_up_proj).chunk(2, -1)
    return functional.silu(gate) * up


def down_sum(
    states: Tensor,
    routing: Routing,
    down_proj: Tensor,
    *,
    residual: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """The weighted sum over the experts of each token, `[T, H]`, in the dtype of the states.

    Args:
        states: `[T, K, I]`.
        residual: `[T, H]` to add.
        shared: `[T, H]`, what a shared expert made of the tokens, to add times `sigmoid(gate)`.
    """
    products = _products(states, routing, down_proj)
    out = (products * routing.weights[..., None]).sum(1).to(states.dtype)
    if shared is not None:
        assert routing.gate is not None
        out = out + routing.gate.sigmoid().to(states.dtype)[:, None] * shared
    return out if residual is None else residual + out


def _products(x: Tensor, routing: Routing, weight: Tensor) -> Tensor:
    """`x: [T, K, columns]` of every pair times its expert's weight, `[T, K, rows]`."""
    out = torch.empty((*x.shape[:2], weight.shape[1]), dtype=x.dtype, device=x.device)
    for expert in routing.chosen.unique().tolist():
        pairs = routing.chosen == expert
        out[pairs] = functional.linear(x[pairs], weight[expert])
    return out
