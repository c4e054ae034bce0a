"""`mixture`: the experts of a layer for any number of tokens, by the kernels that suit them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.kernels.experts import few, grouped
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.layer.split_sums import SplitSums


def mixture(
    x: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    residual: Tensor | None = None,
    shared: Tensor | None = None,
    sums: SplitSums | None = None,
    weights_settled: bool = False,
) -> Tensor:
    """The weighted sum over the experts of each token, `[T, H]`; arguments as of `few.gate_up_silu` and `few.down_sum`."""
    if routing.counts is None:
        states = few.gate_up_silu(x, routing, gate_up_proj)
        options: dict[str, Any] = {"residual": residual, "shared": shared}
        return few.down_sum(states, routing, down_proj, sums=sums, weights_settled=weights_settled, **options)
    order = grouped.sort_pairs(routing)
    states = grouped.gate_up_silu(x, routing, order, gate_up_proj)
    return grouped.down_sum(states, routing, order, down_proj, residual=residual, shared=shared)
