"""Fused layers without Triton: the same walk over the layers, with PyTorch's versions of its operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.attention import rope_reference, rope_tables
from hf_fastattn.kernels.experts import reference as experts
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.layer import reference
from hf_fastattn.kernels.layer.lora import Adapter, check_adapters
from hf_fastattn.kernels.quantised import reference as quantised
from hf_fastattn.patches.fused import forward, mixture, products


@contextmanager
def fused_in_torch() -> Iterator[None]:
    """Layers are fused on the CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "choose_backend", lambda *_: ("torch", None))
        patch.setattr(products, "beats_cublas", lambda *_: True)
        for name, operation in (
            ("matvec", _matvec), ("gate_up_silu", _gate_up_silu), ("rms_norm", _rms_norm), ("add_rms_norm", _add_rms_norm),
            ("silu_and_mul", reference.silu_and_mul),
        ):  # fmt: skip
            patch.setattr(products, name, operation)
            if hasattr(mixture, name):
                patch.setattr(mixture, name, operation)
        patch.setattr(products.quantised, "matvec", _quantised_matvec)
        patch.setattr(products.quantised, "gate_up_silu", lambda x, gate, up, **_: quantised.gate_up_silu(x, gate, up))
        patch.setattr(rope_tables, "rope_tables", rope_reference.tables)
        patch.setattr(mixture, "route", _route)
        patch.setattr(mixture, "mixture", _mixture)
        yield


def _matvec(
    x: Tensor, weights: Sequence[Tensor], biases: Any = None, *, residual: Tensor | None = None,
    lora: Sequence[Adapter | None] | None = None, lora_numbers: Tensor | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    outs = reference.matvec(x, weights, biases)
    if lora is not None:
        check_adapters(x, weights, lora, lora_numbers)
        outs = tuple(_adapted(x, out, one, lora_numbers) for out, one in zip(outs, lora, strict=True))
    return outs if residual is None else tuple(residual + out for out in outs)


def _quantised_matvec(
    x: Tensor, weights: Sequence[Any], biases: Any = None, *, residual: Tensor | None = None, **_: Any
) -> tuple[Tensor, ...]:
    return quantised.matvec(x, weights, biases, residual=residual)


def _adapted(x: Tensor, y: Tensor, one: Adapter | None, numbers: Tensor | None) -> Tensor:
    if one is None:
        return y
    shrunk = x.float() @ one.a.float().T
    if one.members is not None:
        assert numbers is not None
        mine = numbers[:, None] == one.members.numbers[None]
        shrunk = torch.where(mine, shrunk * one.members.scales, 0.0)
    return (y + shrunk @ one.b.float().T * one.scale).to(y.dtype)


def _gate_up_silu(x: Tensor, w_gate: Tensor, w_up: Tensor, **options: Any) -> Tensor:
    return reference.silu_and_mul(*_matvec(x, (w_gate, w_up), **options))


def _route(
    x: Tensor, weight: Tensor, top_k: int, *, sums: Any = None, weights_settled: bool = False, **options: Any
) -> Routing:
    return experts.route(x, weight, top_k, **options)


def _mixture(
    x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor, *, residual: Tensor | None = None,
    shared: Tensor | None = None, out: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    states = experts.gate_up_silu(x, routing, gate_up_proj)
    total = experts.down_sum(states, routing, down_proj, residual=residual, shared=shared)
    return total if out is None else out.copy_(total)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, dtype: Any = None, **_: Any) -> Tensor:
    return reference.rms_norm(x, weight, eps, unit_offset).to(dtype or x.dtype)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, dtype: Any = None,
    other: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = residual + (x if other is None else x + other)
    return _rms_norm(total, weight, eps, unit_offset=unit_offset, dtype=dtype), total
