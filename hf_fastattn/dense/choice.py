"""Which calls of the attention function Transformers' own attention computes: it must, or our kernels would gain nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.dense.causal_layout import CausalLayout

# Reasons that are none to worry about.
ONE_LAUNCH = "PyTorch's attention does this in one launch"
SMALL_ON_CPU = "so little on a CPU takes no more in Transformers' steps"
# Scores of a call (rows * heads * queries * keys) up to which that holds: of plain ones, and of those with softcap or sinks
# where PyTorch has quick products of the dtype, and where it has none and ours are in fp32.
FEW_SCORES = {"plain": 2**19, "quick": 2**21, "slow": 2**14}
# Of a CPU that multiplies numbers of 16 bits.
QUICK = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
# Head dims up to this are taken by PyTorch's fused kernels.
MAX_FUSED_DIM = 256


def why_stock(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why a call must run Transformers' attention; None if our kernels can take it."""
    if mask is not None and mask.ndim != 2:
        return "a mask that is not plain causal or sliding"
    if not causal:
        return "is_causal=False"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, kwargs.get("s_aux"))):
        return "gradients are needed"
    for name in ("dropout", "output_attentions"):
        if kwargs.get(name):
            return name
    if kwargs.get("position_bias") is not None:
        return "position_bias"
    if kwargs.get("cache") is not None:
        return "continuous batching"
    # Without a mask sdpa aligns S queries with the first S keys; for these two that is the same.
    if mask is None and query.shape[2] not in (1, key.shape[2]):
        return "no mask, and other numbers of queries and keys"
    return _why_not_these(query, key, value) or _why_not_scores(kwargs.get("scaling"), kwargs.get("softcap"))


def _why_not_these(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
        return "head dims of keys and values differ"
    if query.shape[1] % key.shape[1]:
        return "query heads are no multiple of key heads"
    if not query.dtype == key.dtype == value.dtype:
        return "dtypes of queries, keys and values differ"
    return None


def _why_not_scores(*factors: Any) -> str | None:
    positive = all(x is None or (isinstance(x, int | float) and x > 0) for x in factors)
    return None if positive else "scaling or softcap is not a positive number"


def why_stock_is_enough(
    module: Any, query: Tensor, key: Tensor, layout: CausalLayout | None, kwargs: dict[str, Any]
) -> str | None:
    """Why Transformers' attention costs no more than ours would; None if it does.

    Args:
        layout: what the queries see, in a call that has passed `why_stock`; None for plain causal attention of all keys.
    """
    rows, heads, queries, dim = query.shape
    is_cpu = query.device.type == "cpu"
    is_plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    if is_plain and heads != key.shape[1] * getattr(module, "num_key_value_groups", 1):
        # sdpa repeats keys as the module says.
        return None
    if is_plain and (layout is None or layout.is_whole(queries)):
        fused = is_cpu or (query.element_size() == 2 and dim <= MAX_FUSED_DIM)
        return ONE_LAUNCH if fused else None
    if not is_cpu:
        return None
    kind = "plain" if is_plain else "quick" if _has_quick_products(query.dtype) else "slow"
    few = rows * heads * queries * key.shape[2] <= FEW_SCORES.get(kind, 0)
    step = queries == 1 and kind != "slow" and not (layout is not None and layout.is_narrow)
    return SMALL_ON_CPU if few or step else None


@functools.cache
def _has_quick_products(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of `dtype` on this CPU are no slower than those of fp32."""
    if dtype.itemsize > 2:
        return True
    # Absent before PyTorch 2.10.
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in QUICK.get(dtype, ()))
