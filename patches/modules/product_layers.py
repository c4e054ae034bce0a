"""The linear layers of a model that fused layers multiply with by themselves, whether or not they are plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_fastattn.graphs.module_checks import is_our_forward
from hf_fastattn.patches.modules.module_state import ModuleState
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import has_no_foreign_hooks, is_plain, layers_of

OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OF_MLP = ("gate_proj", "up_proj", "down_proj")


def product_layers(decoder: Any, lm_head: nn.Module | None = None) -> Iterator[nn.Module]:
    """The projections of attentions and MLPs that are not called as a whole, and `lm_head` if it is given.

    Args:
        decoder: patched, with fused layers (`fused_reason`).
    """
    state: ModuleState = vars(decoder)[STATE]
    assert state.family.layers is not None
    for layer in layers_of(decoder):
        attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
        if is_plain_attention(attention):
            yield from (attention._modules[name] for name in OF_ATTENTION)
        if is_plain(mlp, state.family.layers.mlp):
            yield from (mlp._modules[name] for name in OF_MLP)
    if lm_head is not None:
        yield lm_head


def is_plain_attention(module: Any) -> bool:
    """Whether calling the module runs our forward, and nothing before or after it."""
    state = vars(module)
    return (
        STATE in state
        and is_our_forward(module.forward)
        and "_hf_hook" not in state
        and state.get("_compiled_call_impl") is None
        and has_no_foreign_hooks(module)
    )
