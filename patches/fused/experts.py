"""A layer's mixture of experts by our kernels, where its modules are Transformers' own; elsewhere the block is called.

Which function Transformers would call for the experts (`experts_implementation`: "eager", "grouped_mm" or "batched_mm",
between which `generate()` switches) makes no difference here: all of them compute the same. What is not theirs is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_fastattn.autocast import region_dtype
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import is_plain, is_plain_tensor, is_silu, layers_of, linear_parameters

MIXTURE = "a mixture of experts chooses what it computes"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# What Transformers' decorator says of the layout of an experts' module, and what our kernels take.
LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
# Above it the router's kernel would not keep all scores of a token in registers.
MOST_EXPERTS = 1024


class HeldExperts(NamedTuple):
    """What a block holds.

    Attributes:
        router: `[E, H]`.
        top_k: experts a token.
        normalise: their weights add up to 1.
        gate_up: `[E, 2 I, H]`; `down: [E, H, I]`.
        shared: a shared expert, and `gate: [1, H]` of it, if there is one.
    """

    router: Tensor
    top_k: int
    normalise: bool
    gate_up: Tensor
    down: Tensor
    shared: nn.Module | None
    gate: Tensor | None


def held_experts(block: Any, names: LayerNames, device: torch.device, dtype: torch.dtype) -> HeldExperts | None:
    """What a plain block holds, in `dtype`; None if it has to be called.

    Args:
        block: a layer's `mlp`.
        names: of the classes in the layer.
    """
    kinds = names.mixture
    if kinds is None or not is_plain(block, kinds.block, device) or dtype not in DTYPES:
        return None
    # Mixtral's noise on what a block is given, in train mode.
    if block.training and getattr(block, "jitter_noise", 0):
        return None
    router, experts = block._modules.get("gate"), block._modules.get("experts")
    if router is None or not is_plain(router, kinds.router, device) or set(router._parameters) != {"weight"}:
        return None
    if experts is None or not is_plain(experts, kinds.experts, device) or not _computes_as_written(experts, device):
        return None
    weight, held = router._parameters["weight"], experts._parameters
    if set(held) != {"gate_up_proj", "down_proj"}:
        return None
    gate_up, down = held["gate_up_proj"], held["down_proj"]
    if not all(is_plain_tensor(tensor, device, (dtype,)) for tensor in (weight, gate_up, down)):
        return None
    assert weight is not None and gate_up is not None and down is not None
    count, hidden, inner = down.shape
    fits = gate_up.shape == (count, 2 * inner, hidden) and weight.shape == (count, hidden)
    if not fits or not 1 <= router.top_k <= count <= MOST_EXPERTS:
        return None
    shared, gate = block._modules.get("shared_expert"), None
    if shared is not None:
        linear = linear_parameters(block._modules["shared_expert_gate"], device, (dtype,))
        if linear is None or linear[1] is not None or linear[0].shape != (1, hidden):
            return None
        gate = linear[0]
    return HeldExperts(weight, router.top_k, getattr(router, "norm_topk_prob", True), gate_up, down, shared, gate)


def why_not_captured(model: Any) -> str | None:
    """Why the launches of a decoder's mixtures may differ from step to step; None if all are ours.

    Args:
        model: a patched decoder, or a model around one.
    """
    decoder = getattr(model, "base_model", model)
    names = vars(decoder)[STATE].family.layers
    if names is None or names.mixture is None or region_dtype(decoder.device) is not None:
        return MIXTURE
    device, dtype = decoder.device, decoder.dtype
    for layer in layers_of(decoder):
        mlp = layer._modules.get("mlp")
        if mlp is None or (not is_plain(mlp, names.mlp, device) and held_experts(mlp, names, device, dtype) is None):
            return MIXTURE
    return None


def _computes_as_written(experts: Any, device: torch.device) -> bool:
    """Whether an experts' module, of Transformers' own class, computes silu(gate) * up and down of plain weights."""
    state = vars(experts)
    if any(state.get(name, wanted) != wanted for name, wanted in LAYOUT.items()) or "_apply_gate" in state:
        return False
    gate = getattr(type(experts), "_apply_gate", None)
    if getattr(gate, "__module__", "") != "transformers.integrations.moe" or not is_silu(experts._modules["act_fn"], device):
        return False
    name = getattr(state.get("config"), "_experts_implementation", None)
    if name not in IMPLEMENTATIONS:
        return False
    function = ALL_EXPERTS_FUNCTIONS.get(name)
    return function is None or function.__module__ == "transformers.integrations.moe"
