"""Norms, products and activation of a layer by PyTorch, where our kernels do not run: what `products.py` is elsewhere.

The same functions as in Transformers' layers, in the same order, so that nothing is rounded otherwise. What plain modules
compute is computed here, without calling them, which on a CPU takes as long as a small product; all others are called.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_fastattn.parallel.later_sums import LaterSum
from hf_fastattn.parallel.peer_memory import Delta, PeerSum
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.modules.plain_modules import is_plain, is_silu, norm_eps, norm_weight, plain_shard, projected

# Dtypes that norms widen to fp32.
NARROW = (torch.float16, torch.bfloat16)


class PlainProducts:
    """The operations on the tokens of one forward; see `Products`, whose methods these are.

    Args:
        names: of the layers' classes.
        leading: shape that modules see, without its last dimension; T elements.
    """

    adapters_fused = 0
    quantised_products = 0

    def __init__(self, names: LayerNames, leading: tuple[int, ...]) -> None:
        self.names = names
        self.leading = leading
        self.tokens = math.prod(leading)

    def call(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module makes of `x: [T, K]`, given to it as `[B, S, K]`; `[T, N]`."""
        out = module(x.view(*self.leading, -1))
        return (out[0] if isinstance(out, tuple) else out).reshape(self.tokens, -1)

    def norm(self, module: Any, x: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        """The norm of `x + delta`, and that sum."""
        # Sums over ranks are made by the layers that are called.
        assert not isinstance(delta, PeerSum | LaterSum)
        x = x if delta is None else x + delta
        weight = None if self.names.unit_offset else norm_weight(module, self.names.norm, x.device, (x.dtype,))
        if weight is None or x.dtype not in (*NARROW, torch.float32):
            return self.call(module, x), x
        if x.dtype is torch.float32:
            return functional.rms_norm(x, (x.shape[1],), weight, norm_eps(module)), x
        # Rounded before the weight is multiplied in, as Transformers does.
        return weight * functional.rms_norm(x.float(), (x.shape[1],), None, norm_eps(module)).to(x.dtype), x

    def project(self, norm: Any, linears: tuple[Any, ...], x: Tensor, delta: Delta) -> tuple[tuple[Tensor, ...], Tensor]:
        """The products of the norm of `x + delta` with several weights, `[T, N_i]` each, and the sum."""
        normed, x = self.norm(norm, x, delta)
        return tuple(self._linear(linear, normed) for linear in linears), x

    def multiply(self, linears: tuple[Any, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The products of `x: [T, K]` with several weights, `[T, N_i]` each."""
        return tuple(self._linear(linear, x) for linear in linears)

    def gated(self, norm: Any, gate: Any, up: Any, act_fn: nn.Module, x: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        """`act_fn(gate) * up` of the norm of `x + delta`, `[T, I]`, and the sum."""
        normed, x = self.norm(norm, x, delta)
        left = self._linear(gate, normed)
        left = functional.silu(left) if is_silu(act_fn, x.device) else self.call(act_fn, left)
        return left * self._linear(up, normed), x

    def add_product(self, linear: Any, states: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream with the product of `states: [T, K]` in it."""
        return x + self._linear(linear, states), None

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        if type(module) is not nn.Linear or not is_plain(module, "Linear", x.device):
            return self.call(module if plain_shard(module) is None else functools.partial(projected, module), x)
        held = module._parameters
        weight = held.get("weight")
        if weight is None or "bias" not in held:
            return self.call(module, x)
        return functional.linear(x, weight, held["bias"])
