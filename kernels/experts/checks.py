"""Checks of the arguments of the experts' products."""

from __future__ import annotations

from torch import Tensor

from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.launch import DTYPES


def check_gate_up(x: Tensor, routing: Routing | None, gate_up_proj: Tensor, most: int | None = None) -> None:
    """Raise a `ValueError` unless these are what `gate_up_silu` takes; `most` tokens; no routing if x has a row a pair."""
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1 or not x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()}, {x.dtype}, must be [T, H], contiguous in its last dimension, "
            f"of a dtype among {DTYPES}"
        )
    if routing is not None:
        _check_routing(x.shape[0], routing, most)
    shape = gate_up_proj.shape
    if len(shape) != 3 or shape[1] % 2 or shape[2] != x.shape[1]:
        raise ValueError(f"gate_up_proj {tuple(shape)} must be [E, 2 I, H] with H = {x.shape[1]}")
    _check_weight("gate_up_proj", gate_up_proj, x)


def check_down(
    states: Tensor,
    routing: Routing,
    down_proj: Tensor,
    residual: Tensor | None,
    shared: Tensor | None,
    most: int | None = None,
) -> None:
    """Raise a `ValueError` unless these are what `down_sum` takes; `most` tokens."""
    if states.ndim != 3 or states.dtype not in DTYPES or not states.is_contiguous():
        raise ValueError(
            f"states {tuple(states.shape)}, {states.dtype}, must be [T, K, I], contiguous, of a dtype among {DTYPES}"
        )
    _check_routing(states.shape[0], routing, most)
    shape = down_proj.shape
    if len(shape) != 3 or shape[2] != states.shape[2]:
        raise ValueError(f"down_proj {tuple(shape)} must be [E, H, I] with I = {states.shape[2]}")
    _check_weight("down_proj", down_proj, states)
    for name, added in (("residual", residual), ("shared", shared)):
        if added is not None and (
            added.shape != (states.shape[0], shape[1]) or added.dtype is not states.dtype or added.stride(1) != 1
        ):
            raise ValueError(f"{name} {tuple(added.shape)}, {added.dtype}, must be [T, H] as the output, {states.dtype}")
    if shared is not None and routing.gate is None:
        raise ValueError("shared needs a routing with a gate: give the router a gate_weight")


def _check_routing(tokens: int, routing: Routing, most: int | None) -> None:
    if routing.chosen.shape[0] != tokens or (most is not None and tokens > most):
        limit = "" if most is None else f", of up to {most}"
        raise ValueError(f"the routing is of {routing.chosen.shape[0]} tokens; expected {tokens}{limit}")


def _check_weight(name: str, weight: Tensor, like: Tensor) -> None:
    if weight.dtype is not like.dtype or not weight.is_contiguous():
        raise ValueError(f"{name}, {weight.dtype} with strides {weight.stride()}, must be contiguous and {like.dtype}")
