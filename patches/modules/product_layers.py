"""The linear layers of a model that fused layers multiply with by themselves, whether or not they are plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_fastattn.graphs.module_checks import is_our_forward
from hf_fastattn.patches.modules.module_state import ModuleState
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import has_no_foreign_hooks, is_plain, layers_of, written_module
from hf_fastattn.wrappers import runs_class_forward

OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OF_DELTA = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
OF_MLP = ("gate_proj", "up_proj", "down_proj")


def product_layers(decoder: Any, device: torch.device, lm_head: nn.Module | None = None) -> Iterator[nn.Module]:
    """The projections of attentions and MLPs that are not called as a whole, and `lm_head` if it is given.

    Args:
        decoder: patched, with fused layers (`fused_reason`).
        device: of everything that layers are given.
    """
    state: ModuleState = vars(decoder)[STATE]
    assert state.family.layers is not None
    for layer in layers_of(decoder):
        attention, mlp = layer._modules.get("self_attn"), layer._modules["mlp"]
        if attention is None:
            linear = layer._modules["linear_attn"]._modules
            yield from (linear[name] for name in OF_DELTA if name in linear)
        elif runs_our_forward(attention, device):
            yield from (attention._modules[name] for name in OF_ATTENTION)
        if is_plain(mlp, state.family.layers.mlp, device):
            yield from (mlp._modules[name] for name in OF_MLP)
    if lm_head is not None:
        yield written_module(lm_head)


def runs_our_forward(module: Any, device: torch.device) -> bool:
    """Whether calling the module runs our forward, and nothing before or after it."""
    ours = STATE in vars(module) and is_our_forward(type(module).forward)
    return ours and runs_class_forward(module, device) and has_no_foreign_hooks(module)
