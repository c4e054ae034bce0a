"""`mixture`: the experts of a layer for any number of tokens, by the kernels that suit them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.kernels.experts import few, grouped
from hf_fastattn.kernels.experts.configs import HOPPER_PAIRS, HOPPER_TOKENS, pairs_a_tile
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.launch import arch_of
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
    hopper: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted sum over the experts of each token, `[T, H]`; arguments as of `few.gate_up_silu` and `few.down_sum`.

    Args:
        hopper: take the Gluon kernels where they are quicker; see `backends.gluon_experts`.
        out: where the sum of few tokens goes, `[T, H]`; of more it goes elsewhere all the same.
    """
    options: dict[str, Any] = {"residual": residual, "shared": shared}
    if routing.counts is None:
        states = few.gate_up_silu(x, routing, gate_up_proj)
        return few.down_sum(states, routing, down_proj, sums=sums, weights_settled=weights_settled, out=out, **options)
    if hopper and _pays_on_hopper(x, routing, gate_up_proj, down_proj):
        from hf_fastattn.kernels.experts import hopper_grouped
        from hf_fastattn.kernels.experts.sorted_rows import sort_rows

        block_m = hopper_grouped.pairs_a_tile(routing.chosen.numel(), gate_up_proj.shape[0])
        rows, work = sort_rows(x, routing, block_m)
        states = hopper_grouped.gate_up_silu(rows, work, routing, gate_up_proj)
        # As large as what the experts give.
        del rows
        return hopper_grouped.down_sum(states, work, routing, down_proj, **options)
    block_m = pairs_a_tile(arch_of(x.device), x.element_size(), *routing.chosen.shape, gate_up_proj.shape[0])
    work = grouped.sort_pairs(routing, block_m)
    states = grouped.gate_up_silu(x, routing, work, gate_up_proj)
    return grouped.down_sum(states, routing, work, down_proj, **options)


def _pays_on_hopper(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    """Whether pairs or tokens are enough, and shapes ones that the Gluon kernels take."""
    if routing.chosen.numel() < HOPPER_PAIRS * gate_up_proj.shape[0] and x.shape[0] < HOPPER_TOKENS:
        return False
    from hf_fastattn.kernels.experts.hopper_grouped import why_not_hopper

    return why_not_hopper(x, gate_up_proj, down_proj) is None
