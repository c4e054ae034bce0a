"""A layer's mixture of experts by our kernels, where its modules are Transformers' own; elsewhere the block is called.

Which function Transformers would call for the experts (`experts_implementation`: "eager", "grouped_mm" or "batched_mm",
between which `generate()` switches) makes no difference here: all of them compute the same. What is not theirs is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_fastattn.autocast import region_dtype
from hf_fastattn.graphs.placement import place_of
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.patches.family import LayerNames, MixtureNames
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import (
    is_plain,
    is_plain_layer,
    is_plain_tensor,
    is_silu,
    layers_of,
    linear_parameters,
    plain_expert_shard,
)
from hf_fastattn.patches.modules.product_layers import runs_our_forward

MIXTURE = "a mixture of experts chooses what it computes"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SWITCHED = IMPLEMENTATIONS[1:]
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
        group: of the ranks that hold the other parts of every expert, if they do; a shared expert is whole on each.
    """

    router: Tensor
    top_k: int
    normalise: bool
    gate_up: Tensor
    down: Tensor
    shared: nn.Module | None
    gate: Tensor | None
    group: Any = None


def held_experts(block: Any, names: LayerNames, device: torch.device, dtype: torch.dtype) -> HeldExperts | None:
    """What a plain block holds, in `dtype`; None if it has to be called.

    Args:
        block: a layer's `mlp`.
        names: of the classes in the layer.
    """
    kinds = names.mixture
    return held_in(block, kinds, device, dtype) if kinds is not None and _is_plain_block(block, kinds, device) else None


def _is_plain_block(block: Any, kinds: MixtureNames, device: torch.device) -> bool:
    """Whether calling the block runs its class's forward, or ours in its place, and nothing before or after it."""
    return is_plain(block, kinds.block, device) or runs_our_forward(block, device)


def held_in(block: Any, kinds: MixtureNames, device: torch.device, dtype: torch.dtype) -> HeldExperts | None:
    """The same of a block whose own forward does what its class says, whatever is around it."""
    # Mixtral's noise on what a block is given, in train mode.
    if dtype not in DTYPES or (block.training and getattr(block, "jitter_noise", 0)):
        return None
    router, experts = block._modules.get("gate"), block._modules.get("experts")
    # Hooks that Transformers left there record nothing in a forward that is not asked for router logits.
    if router is None or not is_plain_layer(router, kinds.router, device) or set(router._parameters) != {"weight"}:
        return None
    part = None if experts is None else plain_expert_shard(experts, kinds.experts)
    known = part is not None or (experts is not None and is_plain(experts, kinds.experts, device))
    if experts is None or not known or not _computes_as_written(experts, device):
        return None
    weight, held = router._parameters["weight"], experts._parameters
    if set(held) != {"gate_up_proj", "down_proj"}:
        return None
    gate_up, down = (held["gate_up_proj"], held["down_proj"]) if part is None else part[:2]
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
    group = None if part is None else part.group
    normalise = getattr(router, "norm_topk_prob", True)
    return HeldExperts(weight, router.top_k, normalise, gate_up, down, shared, gate, group)


def why_not_captured(model: Any, steps: bool = True) -> str | None:
    """Why the launches of a decoder's mixtures may differ from step to step; None if they do not.

    Args:
        model: a patched model, or its decoder.
        steps: of decode steps, in which a block that is called may run by `batched_mm`; else of any forward.
    """
    state = vars(model)[STATE]
    decoder, names = state.decoder(model) if hasattr(state, "decoder") else model, state.family.layers
    if names is None or names.mixture is None:
        return MIXTURE
    device, dtype, narrowed = decoder.device, decoder.dtype, region_dtype(decoder.device) is not None
    for layer in layers_of(decoder):
        device, mlp = place_of(layer, device), layer._modules.get("mlp")
        if mlp is None:
            return MIXTURE
        ours = is_plain(mlp, names.mlp, device) or (not narrowed and held_experts(mlp, names, device, dtype) is not None)
        if not ours and not (steps and runs_batched(mlp, names, device)):
            return MIXTURE
    return None


def runs_batched(block: Any, names: LayerNames, device: torch.device) -> bool:
    """Whether calling a block comes to Transformers' own router, and experts by `grouped_mm` or `batched_mm`.

    The latter launches the same kernels whatever experts are chosen, and waits for nothing.
    """
    kinds = names.mixture
    if kinds is None or not _is_plain_block(block, kinds, device) or (block.training and getattr(block, "jitter_noise", 0)):
        return False
    router, experts = block._modules.get("gate"), block._modules.get("experts")
    if router is None or experts is None or not is_plain_layer(router, kinds.router, device):
        return False
    state, name = vars(experts), _implementation(experts)
    own = is_plain(experts, kinds.experts, device) and "_apply_gate" not in state and not state.get("_is_expert_parallel")
    return own and name in SWITCHED and _is_transformers_own(name)


@contextmanager
def by_batched_mm(block: Any) -> Iterator[None]:
    """A block that `runs_batched`, called inside as generate() calls it in steps on a GPU: by `batched_mm`."""
    config = block._modules["experts"].config
    before = config._experts_implementation_internal
    config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation_internal = before


def _computes_as_written(experts: Any, device: torch.device) -> bool:
    """Whether an experts' module, of Transformers' own class, computes silu(gate) * up and down of plain weights."""
    state = vars(experts)
    if any(state.get(name, wanted) != wanted for name, wanted in LAYOUT.items()) or "_apply_gate" in state:
        return False
    gate = getattr(type(experts), "_apply_gate", None)
    if getattr(gate, "__module__", "") != "transformers.integrations.moe" or not is_silu(
        experts._modules.get("act_fn"), device
    ):
        return False
    name = _implementation(experts)
    return name in IMPLEMENTATIONS and _is_transformers_own(name)


def _implementation(experts: Any) -> Any:
    return getattr(vars(experts).get("config"), "_experts_implementation", None)


def _is_transformers_own(name: str) -> bool:
    function = ALL_EXPERTS_FUNCTIONS.get(name)
    return function is None or function.__module__ == "transformers.integrations.moe"
