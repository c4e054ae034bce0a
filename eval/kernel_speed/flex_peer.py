"""PyTorch's compiled FlexAttention with a variant's functions, on contiguous keys and values of the same sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_fastattn.eval.kernel_speed.attention_cases import Inputs
from hf_fastattn.eval.kernel_speed.graph_timer import Launch
from hf_fastattn.eval.kernel_speed.variant_cases import dense
from hf_fastattn.kernels.variants.variant import Variant


@functools.cache
def compiled() -> Callable[..., Any]:
    """`flex_attention`, compiled for each shape and function."""
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def flex_launch(inputs: Inputs, variant: Variant, scale: float) -> Launch:
    """Of set i. What it visits is computed beforehand, and not timed."""
    shape, device = inputs.shape, inputs.page_table.device
    length, new = shape.lengths[0], shape.news[0]
    past = length - new
    own = variant.functions().get("score_mod")

    def score(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return own(s, b, h, q_idx + past, kv_idx)  # type: ignore[misc]

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query = q_idx + past
        shown = kv_idx <= query if variant.causal else kv_idx >= 0
        if variant.window is not None:
            shown = shown & (kv_idx > query - variant.window)
        return shown if variant.mask_mod is None else shown & variant.mask_mod(b, h, query, kv_idx)

    hides = new > 1 or variant.window is not None or variant.mask_mod is not None
    block_mask = create_block_mask(mask, None, None, new, length, device=str(device)) if hides else None
    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": True}
    options |= {} if own is None else {"score_mod": score}
    sets, run = dense(inputs), compiled()
    return lambda i: run(*sets[i % len(sets)], **options)
