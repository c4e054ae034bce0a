"""Products of few tokens that one launch makes together with the norm before them, where that is quicker than two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_fastattn.kernels.layer.configs import one_wave_tile
from hf_fastattn.kernels.layer.few_rows import few_rows, takes, takes_norm
from hf_fastattn.kernels.layer.few_rows_configs import few_rows_tile
from hf_fastattn.kernels.layer.lora import Adapter
from hf_fastattn.kernels.layer.one_wave import one_wave


class Held(NamedTuple):
    """What products with several linear layers take: all biases or none, adapters or None where no layer has one."""

    weights: list[Tensor]
    biases: list[Tensor] | None
    adapters: list[Adapter | None] | None


def product_at_once(
    arch: int,
    held: Held,
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    *,
    unit_offset: bool,
    gated: bool,
    residual: Tensor | None,
    asks_for_l1: bool,
) -> Tensor | None:
    """The products of `x: [T, K]`, or of its RMSNorm, side by side: `[T, rows of all weights]`, or `[T, I]` if gated.

    Args:
        arch: compute capability, times ten.
        norm: `[K]` weight of the norm; None if there is none.
        eps: of the norm.
        unit_offset: it multiplies by `1 + norm`.
        gated: the activation of gate times up.
        residual: added to the product of a single weight.
        asks_for_l1: see `few_rows` and `one_wave`.

    Returns:
        None where launches of their own are quicker, or a kernel does not take what is given.
    """
    tokens, k = x.shape
    same = x.is_contiguous() and held.weights[0].dtype is x.dtype and (residual is None or residual.dtype is x.dtype)
    if not same or held.adapters is not None or (gated and held.biases is not None):
        return None
    rows = sum(weight.shape[0] for weight in held.weights)
    if tokens == 1:
        tile = one_wave_tile(arch, x.element_size(), k, rows, gated)
        if tile is None:
            return None
        return one_wave(
            x, held.weights, held.biases, tile=tile, residual=residual, norm=norm, gated=gated, weights_settled=True,
            eps=eps, unit_offset=unit_offset, asks_for_l1=asks_for_l1 and tile.l1,
        )  # fmt: skip
    # Without a norm `matvec` finds by itself which kernel is quickest.
    few = None if norm is None else few_rows_tile(arch, x.element_size(), tokens, k, rows, gated, True)
    if few is None or norm is None or not takes(x, held.weights, few, asks_for_l1) or not takes_norm(x, norm):
        return None
    return few_rows(
        x, held.weights, held.biases, tile=few, residual=residual, norm=norm, gated=gated, weights_settled=True,
        eps=eps, unit_offset=unit_offset, asks_for_l1=asks_for_l1,
    )  # fmt: skip
