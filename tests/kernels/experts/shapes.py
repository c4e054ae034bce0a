"""Inputs of a mixture of experts, with a router that is told which experts to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from hf_fastattn.kernels.experts import few, reference, router
from hf_fastattn.kernels.experts import mixture as ours
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.layer.configs import ProductTile
from tests.kernels.cases import assert_close


@dataclass(frozen=True)
class Layer:
    """Inputs and weights of one mixture.

    Attributes:
        x: `[T, H]`; `residual` and `shared` likewise, or None.
        gate_weight: `[1, H]` with a shared expert, else None.
    """

    x: Tensor
    weight: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    residual: Tensor | None
    shared: Tensor | None
    gate_weight: Tensor | None

    def to(self, dtype: torch.dtype) -> Layer:
        """The same in another dtype."""
        return replace(self, **{name: value.to(dtype) for name, value in vars(self).items() if value is not None})


def with_wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a program costs as much as what it computes: one token's products in fewer of them."""
    if not knobs.runtime.interpret:
        return

    def wide(tile_of: Callable[..., ProductTile]) -> Callable[..., ProductTile]:
        def tile(arch: int, itemsize: int, tokens: int, *sizes: int) -> ProductTile:
            found = tile_of(arch, itemsize, tokens, *sizes)
            return replace(found, block_n=32) if tokens == 1 else found

        return tile

    for name in ("gate_up_tile", "down_tile"):
        monkeypatch.setattr(few, name, wide(getattr(few, name)))


def make_layer(
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    residual: bool = True,
    shared: bool = False,
    device: str = "cpu",
    strided: bool = False,
    seed: int = 0,
) -> Layer:
    """Random weights, of the size that keeps values near 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    wide = rows(tokens, hidden + 8)
    return Layer(
        wide[:, :hidden] if strided else wide[:, :hidden].contiguous(),
        rows(experts, hidden, scale=hidden**-0.5),
        rows(experts, 2 * inner, hidden, scale=hidden**-0.5),
        rows(experts, hidden, inner, scale=inner**-0.5),
        rows(tokens, hidden + 8)[:, :hidden] if residual else None,
        rows(tokens, hidden) if shared else None,
        rows(1, hidden, scale=hidden**-0.5) if shared else None,
    )


def routed(layer: Layer, top_k: int, **options: Any) -> Routing:
    """What our router makes of it, where it chose as the reference does."""
    got = router.route(layer.x, layer.weight, top_k, gate_weight=layer.gate_weight, **options)
    want = reference.route(layer.x, layer.weight, top_k, gate_weight=layer.gate_weight, **options)
    assert torch.equal(got.chosen, want.chosen)
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-2 if options.get("rounds_weights") else 1e-5, atol=1e-6)
    return got


def tiles_of(counts: list[int], block_m: int) -> list[list[int]]:
    """The work list of experts with so many pairs."""
    found: list[list[int]] = []
    begin = 0
    for expert, count in enumerate(counts):
        first = len(found)
        found += [[expert, first, begin, count]] * -(-count // block_m)
        begin += count
    return found


def outputs(layer: Layer, routing: Routing) -> Tensor:
    """The reference's output."""
    states = reference.gate_up_silu(layer.x, routing, layer.gate_up_proj)
    return reference.down_sum(states, routing, layer.down_proj, residual=layer.residual, shared=layer.shared)


def check(layer: Layer, routing: Routing, repeats: int = 1, **options: Any) -> Tensor:
    """Our output, within the criterion; more repeats give the same bits."""
    arguments = (layer.x, routing, layer.gate_up_proj, layer.down_proj)
    options = {"residual": layer.residual, "shared": layer.shared, **options}
    got = ours.mixture(*arguments, **options)
    exact = Routing(routing.chosen, routing.weights.double(), gate=None if routing.gate is None else routing.gate.double())
    assert_close("mixture", got, outputs(layer, routing), outputs(layer.to(torch.float64), exact))
    for _ in range(repeats - 1):
        assert torch.equal(ours.mixture(*arguments, **options), got)
    return got
