"""What products with a norm before them have to be, for the kernels that make both in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fastattn.kernels.layer import reference

EPS = 1e-5


def wanted(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, residual: Tensor | None, norm: Tensor | None,
    unit_offset: bool, gated: bool,
) -> list[Tensor]:  # fmt: skip
    """The products side by side in plain PyTorch, in the dtype of x and in fp64."""
    outs = []
    for target in (x.dtype, torch.float64):
        y = x.to(target)
        if norm is not None:
            y = reference.rms_norm(y, norm.to(target), EPS, unit_offset)
        held = [weight.to(target) for weight in weights]
        if gated:
            outs.append(reference.gate_up_silu(y, *held))
        else:
            added = {"biases": [one.to(target) for one in biases]} if biases else {}
            added |= {} if residual is None else {"residual": residual.to(target)}
            outs.append(torch.cat(reference.matvec(y, held, **added), 1))
    return outs
