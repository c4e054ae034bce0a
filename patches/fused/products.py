"""Norms, products and activation of a layer: our kernels where the modules are plain, calls of the modules elsewhere.

Between the layers stands the residual stream `x: [T, hidden]` and, where a module was called that nobody could add to x
in passing, its output `delta: [T, hidden]`, which the next norm adds. A norm is always a launch of its own, which
was measured to be quicker, even for one token, than a norm repeated by every program of the product behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.kernels.launch import DTYPES, arch_of
from hf_fastattn.kernels.layer.activation import silu_and_mul
from hf_fastattn.kernels.layer.configs import MOST_TOKENS, beats_cublas
from hf_fastattn.kernels.layer.matvec import gate_up_silu, matvec
from hf_fastattn.kernels.layer.norm import MAX_HIDDEN, add_rms_norm, rms_norm
from hf_fastattn.kernels.layer.split_sums import SplitSums
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.modules.plain_modules import is_silu, linear_parameters, norm_eps, norm_weight


class Products:
    """The operations on the tokens of one forward.

    Weights are taken from the modules at every call. A kernel may prefetch them before earlier launches have ended
    (`weights_settled`), since nothing in a forward writes weights.

    Args:
        names: of the layers' classes.
        leading: shape that called modules see, without its last dimension; T elements.
        device: of the tokens.
    """

    def __init__(self, names: LayerNames, leading: tuple[int, ...], device: torch.device) -> None:
        self.names = names
        self.leading = leading
        self.tokens = math.prod(leading)
        self.arch = arch_of(device)
        # The counters of split-K sums are zeroed once a forward, by a launch that a graph records too.
        sums = SplitSums(device) if self.tokens > 1 else None
        self._launch: dict[str, Any] = {"sums": sums, "weights_settled": True}

    def call(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module makes of `x: [T, K]`, given to it as `[B, S, K]`; `[T, N]`."""
        out = module(x.view(*self.leading, -1))
        return (out[0] if isinstance(out, tuple) else out).reshape(self.tokens, -1)

    def norm(self, module: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `x + delta`, and that sum."""
        weight = norm_weight(module, self.names.norm, x) if x.shape[1] <= MAX_HIDDEN else None
        if weight is None or (delta is not None and delta.dtype is not x.dtype):
            x = x if delta is None else x + delta
            return self.call(module, x), x
        options: dict[str, Any] = {"unit_offset": self.names.unit_offset, "weights_settled": True}
        if delta is None:
            return rms_norm(x, weight, norm_eps(module), **options), x
        return add_rms_norm(delta, x, weight, norm_eps(module), **options)

    def project(
        self, norm: Any, linears: tuple[Any, ...], x: Tensor, delta: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The products of the norm of `x + delta` with several weights, `[T, N_i]` each, and the sum."""
        held = self._parameters(linears, x)
        normed, x = self.norm(norm, x, delta)
        return self._multiply(linears, held, normed), x

    def gated(
        self, norm: Any, gate: Any, up: Any, act_fn: nn.Module, x: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`act_fn(gate) * up` of the norm of `x + delta`, `[T, I]`, and the sum."""
        held, silu = self._parameters((gate, up), x), is_silu(act_fn)
        normed, x = self.norm(norm, x, delta)
        if held is not None and silu and held[1] is None and normed.dtype is x.dtype:
            return gate_up_silu(normed, *held[0], **self._launch), x
        left, right = self._multiply((gate, up), held, normed)
        # The activations of a long prompt are the largest here.
        del normed
        if silu and left.dtype is right.dtype and left.dtype in DTYPES and left.shape == right.shape:
            return silu_and_mul(left, right), x
        return self.call(act_fn, left) * right, x

    def add_product(self, linear: Any, states: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream with the product of `states: [T, K]` in it, or as it was and the product beside it."""
        held = self._parameters((linear,), states) if states.dtype is x.dtype else None
        if held is None:
            return x, self.call(linear, states)
        return matvec(states, *held, residual=x, **self._launch)[0], None

    def _parameters(self, linears: tuple[Any, ...], x: Tensor) -> tuple[list[Tensor], list[Tensor] | None] | None:
        """Weights and biases if the linear layers are plain, all with a bias or all without, and our product pays."""
        if self.tokens > MOST_TOKENS:
            return None
        weights, biases, rows = [], [], 0
        for linear in linears:
            held = linear_parameters(linear, x)
            if held is None:
                return None
            weight, bias = held
            weights.append(weight)
            rows += weight.shape[0]
            if bias is not None:
                biases.append(bias)
        if biases and len(biases) < len(weights):
            return None
        pays = beats_cublas(self.arch, x.element_size(), self.tokens, x.shape[1], rows, len(weights))
        return (weights, biases or None) if pays else None

    def _multiply(
        self, linears: tuple[Any, ...], held: tuple[list[Tensor], list[Tensor] | None] | None, x: Tensor
    ) -> tuple[Tensor, ...]:
        # A norm that was called may have given another dtype.
        if held is None or held[0][0].dtype is not x.dtype:
            return tuple(self.call(linear, x) for linear in linears)
        return matvec(x, *held, **self._launch)
