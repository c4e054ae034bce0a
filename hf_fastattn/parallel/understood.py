"""Whether it is understood what Transformers' tensor parallelism has made of a model: parts of ranks, and their sums."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

from torch import nn

from hf_fastattn.parallel.expert_shards import expert_shard_of
from hf_fastattn.parallel.shards import COLUMNS, CUT, ROWS, is_distributed, shard_of, variables_of
from hf_fastattn.parallel.shared_heads import shared_by
from hf_fastattn.wrappers import below_replicated, origin_of

DISTRIBUTED = "transformers.distributed."
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Look(NamedTuple):
    """What was found of a model, for as long as its modules, their forwards, hooks and weights are what they were."""

    parts: list[Any]
    weights: list[weakref.ref[Any]]
    reason: str | None


# To look at all modules takes the host milliseconds, before every call.
_looked_at: weakref.WeakKeyDictionary[nn.Module, Look] = weakref.WeakKeyDictionary()


def why_not_understood(model: nn.Module) -> str | None:
    """Why a model that is spread over ranks has to run as Transformers would run it; None if it is understood, or whole."""
    return looked_at(model).reason


def looked_at(model: nn.Module) -> Look:
    """What was found of a model; the same object as before if its modules, and who hooks into them, are what they were."""
    parts, weights = _parts_of(model)
    known = _looked_at.get(model)
    if known is not None and known.parts == parts and len(known.weights) == len(weights):
        if all(ref() is weight for ref, weight in zip(known.weights, weights, strict=True)):
            return known
    found = _looked_at[model] = Look(parts, [weakref.ref(weight) for weight in weights], _why_not_understood(model))
    return found


def last_look(model: nn.Module) -> Look:
    """What `looked_at` found last, of a model that it has looked at since code of the user's may have run."""
    known = _looked_at.get(model)
    return looked_at(model) if known is None else known


def _parts_of(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """By which a model is known: its modules, their forwards, modes and hooks; and what it holds."""
    parts: list[Any] = []
    weights: list[Any] = []
    stack = [model]
    while stack:
        module = stack.pop()
        state, kind = vars(module), type(module)
        parts += (
            id(module),
            kind,
            kind.forward,
            kind.__call__,
            state.get("forward"),
            state.get("_compiled_call_impl"),
            state.get("training"),
        )
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state:
            hooks = *state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values(), state.get("_hf_hook")
            parts += [(id(hook), getattr(hook, "takes_packed_rows", False)) for hook in hooks]
        weights += [weight for weight in state["_parameters"].values() if weight is not None]
        stack += [child for child in state["_modules"].values() if child is not None]
    return parts, weights


def _why_not_understood(model: nn.Module) -> str | None:
    groups = set()
    for module in model.modules():
        state = vars(module)
        spread = any(is_distributed(tensor) for tensor in state["_parameters"].values())
        forward = state.get("forward")
        planned = forward is not None and origin_of(forward).startswith(DISTRIBUTED)
        if not spread and not planned:
            continue
        group = _group_of_part(module)
        if group is not None:
            groups.add(group)
        elif spread or below_replicated(forward) is None:
            return f"tensor parallel: {_described(module, forward)} is not understood"
    if not groups:
        return None
    if len(groups) > 1:
        return "tensor parallel: layers are spread over different groups of processes"
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return "tensor parallel: adapters on layers that are spread over ranks"
    reason = next((reason for reason in map(_why_not_heads, model.modules()) if reason is not None), None)
    # Pages hold this rank's key heads.
    cut = any(_shards_in(module) for module in model.modules())
    return reason if reason is not None or cut else "tensor parallel: attention is whole on every rank, other layers are not"


def group_of(model: nn.Module) -> Any:
    """The process group that an understood model is spread over; None if it is whole."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    return next((group for module in model.modules() if (group := _group_of_part(module)) is not None), None)


def sums_of(model: nn.Module) -> int:
    """How often a forward of an understood model sums over ranks what its layers add to the residual stream."""
    shards = [shard for module in model.modules() if (shard := shard_of(module)) is not None]
    experts = sum(expert_shard_of(module) is not None for module in model.modules())
    return sum(shard.kind == ROWS for shard in shards) + experts


def is_understood(module: nn.Module) -> bool:
    """Whether a rank holds a part of the module, and it is known which, and what calling it does."""
    return shard_of(module) is not None or expert_shard_of(module) is not None


def _group_of_part(module: nn.Module) -> Any:
    part = shard_of(module) or expert_shard_of(module)
    return None if part is None else part.group


def _shards_in(attention: nn.Module) -> list[Any]:
    """The parts of the projections of an attention that this rank holds; none of a module of another kind."""
    linears: list[Any] = [attention._modules.get(name) for name in PROJECTIONS]
    if not isinstance(getattr(attention, "head_dim", None), int) or None in linears:
        return []
    return [shard for linear in linears if (shard := shard_of(linear)) is not None]


def _why_not_heads(module: nn.Module) -> str | None:
    """Whether an attention has whole heads on this rank, as many for each key head as on one device, or shares one."""
    shards, linears = _shards_in(module), module._modules
    if not shards:
        return None
    if [shard.kind for shard in shards] != [COLUMNS, COLUMNS, COLUMNS, ROWS]:
        return f"tensor parallel: of the projections of a {type(module).__name__} only some are cut"
    if shared_by(module) > 1:
        return None
    q, k, v, o = (shard.weight.shape[CUT[shard.kind]] for shard in shards)
    dim: Any = module.head_dim
    ratio: Any = getattr(module, "num_key_value_groups", 1)
    queries, keys = (linears[name] for name in PROJECTIONS[:2])
    assert isinstance(queries, nn.Linear) and isinstance(keys, nn.Linear)
    # A head with an output gate has it beside its queries.
    gated = queries.out_features // (keys.out_features * ratio)
    if k % dim or not v == k or not q == k * ratio * gated or not o == k * ratio:
        return f"tensor parallel: {keys.out_features // dim} key heads over {shards[0].group.size()} ranks"
    return None


def _described(module: nn.Module, forward: Any) -> str:
    held = {} if forward is None or getattr(forward, "__closure__", None) is None else variables_of(forward)
    style = held.get("self")
    how = "" if style is None else f"{type(style).__name__} on "
    return f"{how}a {type(module).__name__}"
