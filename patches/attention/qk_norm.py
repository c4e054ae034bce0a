"""qk-norm: fused where the model's norm is the plain one, called where it is anything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.autocast import region_dtype
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.modules.plain_modules import norm_eps, norm_weight


def normalise(module: Any, family: Family, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The qk-norm of `q [T, H, D]` and `k [T, G, D]`: done here, or left to the kernel that rotates and appends.

    Returns:
        q, k and arguments of `rope_append`: q and k unchanged with the norm's arguments if that kernel can do the norm,
        else q and k normalised by the modules and no arguments.
    """
    if family.qk_norm is None:
        return q, k, {}
    norms = (module.q_norm, module.k_norm)
    # Under autocast q is what a product gave in 16 bits and the norm is fp32, as is what it gives, until it is rounded.
    dtypes = (q.dtype,) if region_dtype(q.device) is None else (q.dtype, torch.float32)
    weights = [norm_weight(norm, family.qk_norm, q.device, dtypes) for norm in norms]
    if weights[0] is None or weights[1] is None:
        return norms[0](q), norms[1](k), {}
    eps = norm_eps(norms[0])
    if eps != norm_eps(norms[1]):
        return norms[0](q), norms[1](k), {}
    return q, k, {"q_norm": weights[0], "k_norm": weights[1], "eps": eps, "unit_offset": family.unit_offset}
