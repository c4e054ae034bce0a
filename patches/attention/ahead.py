"""The kernel of prompts' attention, begun to be compiled when a model is patched, behind what the user does meanwhile.

Of all kernels of a first call it takes the longest, some two seconds, and depends on the model alone, not on the call.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.config import FastAttnConfig
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.pages.model_layout import is_pageable, layer_window, template_layers

logger = logging.getLogger("hf_fastattn")


def compile_ahead_of_calls(attentions: list[Any], dtype: torch.dtype, config: FastAttnConfig, plain: bool) -> None:
    """Begin with what the first call of a model will compile, in a thread; nothing where that cannot be known, or helps.

    Args:
        attentions: the attention modules of the model.
        dtype: of its weights.
        plain: no layer has a variant.
    """
    module = next(iter(attentions), None)
    if module is None or config.backend == "reference":
        return
    device = next(module.parameters()).device
    if device.type != "cuda":
        return
    backend, _ = choose_backend("auto", device, dtype, module.head_dim)
    if backend == "reference":
        return
    from hf_fastattn.kernels.rehearsal import can_rehearse, identify_compiler

    if not can_rehearse():
        return
    identify_compiler()
    gluon = backend == "hopper" and config.backend != "triton"
    full = _attends_to_all(attentions, dtype, config) if gluon and plain else None
    if full is not None:
        _begin(full, device, dtype, config.page_size)


def _attends_to_all(attentions: list[Any], dtype: torch.dtype, config: FastAttnConfig) -> Any:
    """A module whose prompts take the kernel without a window, in 16 bits; None if there is none."""
    if dtype not in (torch.bfloat16, torch.float16) or config.kv_dtype is not None or config.streaming is not None:
        return None
    templates = template_layers(attentions[0].config)
    return next((module for module in attentions if _sees_all_keys(templates[module.layer_idx])), None)


def _sees_all_keys(layer: Any) -> bool:
    return is_pageable(layer) and layer_window(layer) is None


def _begin(module: Any, device: torch.device, dtype: torch.dtype, page: int) -> None:
    from hf_fastattn.kernels.rehearsal import compile_behind, noted

    try:
        compile_behind(device, noted(lambda: _attend(module, device, dtype, page)))
    except Exception as error:
        # No memory for a few numbers, say: the first call finds the same fault, or there is none.
        logger.info("hf_fastattn could not compile ahead: %s: %s", type(error).__name__, error)


def _attend(module: Any, device: torch.device, dtype: torch.dtype, page: int) -> None:
    """What attention of a prompt launches, of one token: the kernel is the same for all lengths."""
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill, why_not_hopper

    heads, groups, dim = module.config.num_attention_heads, module.config.num_key_value_heads, module.head_dim

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    q = torch.empty(1, heads, dim, dtype=dtype, device=device)
    k_pages, v_pages = torch.empty(2, 1, page, groups, dim, dtype=dtype, device=device)
    if why_not_hopper(q, k_pages, None, None) is None:
        batch = (numbers(1, 1), numbers(2), numbers(1))
        hopper_prefill(q, k_pages, v_pages, *batch, scale=module.scaling, processors=1)
