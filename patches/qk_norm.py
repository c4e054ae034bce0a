"""qk-norm: fused where the model's norm is the plain one, called where it is anything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_fastattn.patches.family import Family


def normalise(module: Any, family: Family, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What is left to do of the norm on `q [T, H, D]` and `k [T, G, D]`.

    Returns:
        q, k and the norm's arguments for `rope_append`: q and k as they are if it can do the norm, else normalised by
        the modules, and no arguments.
    """
    if family.qk_norm is None:
        return q, k, {}
    norms = (module.q_norm, module.k_norm)
    if not all(_is_plain(norm, family.qk_norm, q) for norm in norms) or _eps(norms[0]) != _eps(norms[1]):
        return norms[0](q), norms[1](k), {}
    return (
        q,
        k,
        {
            "q_norm": norms[0].weight,
            "k_norm": norms[1].weight,
            "eps": _eps(norms[0]),
            "unit_offset": family.unit_offset,
        },
    )


def _is_plain(norm: Any, kind: str, x: Tensor) -> bool:
    """Whether calling the norm does what its class does and nothing else, on weights of the dtype of `x`."""
    if not isinstance(norm, nn.Module) or type(norm).__name__ != kind or "forward" in vars(norm):
        return False
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return not hooked and type(norm.weight) is nn.Parameter and norm.weight.dtype == x.dtype


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
