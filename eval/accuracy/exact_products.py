"""`exact_products`: a model whose linear layers round once, whatever the shape they are computed in."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_fastattn.eval.models import truth_dtype


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Inside, every linear layer computes in the wider dtype (`truth_dtype`) and rounds its output to that of its input.

    Two forwards of other shapes, such as a decode step and a prompt, then have equal products for equal inputs, but for sums
    that lie within the wider dtype's error of where rounding changes.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    try:
        for layer in layers:
            vars(layer)["forward"] = types.MethodType(_exact_linear, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _exact_linear(self: Any, x: Tensor) -> Tensor:
    wide: torch.dtype = truth_dtype(x.dtype)
    bias = None if self.bias is None else self.bias.to(wide)
    return functional.linear(x.to(wide), self.weight.to(wide), bias).to(x.dtype)
