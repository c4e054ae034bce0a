"""What a rank holds of the experts of a layer that Transformers' tensor parallelism has cut: a part of each of them.

A rank has some rows of every expert's gate and up, side by side as in the whole, and the columns of down behind them; the
function in the place of the module's forward sums what all ranks' parts give. Plans that spread whole experts over ranks
("expert parallelism") are not understood.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_fastattn.parallel.shards import is_cut, is_distributed, local_of, plan_variables

NAMES = ("gate_up_proj", "down_proj")
STYLE = "MoeExpertsParallel"


class ExpertShard(NamedTuple):
    """A rank's part of all experts of a layer.

    Attributes:
        gate_up: `[E, 2 I / ranks, H]`, no copy; `down: [E, H, I / ranks]` likewise.
        group: the process group of the ranks that hold the other parts.
    """

    gate_up: Tensor
    down: Tensor
    group: Any


class _Look(NamedTuple):
    """What was found of a module, for as long as its class's forward and weights are what they were."""

    forward: Any
    weights: tuple[weakref.ref[Any], ...]
    group: Any


# By the function that stands in the place of a module's forward.
_looked_at: weakref.WeakKeyDictionary[Any, _Look] = weakref.WeakKeyDictionary()


def expert_shard_of(module: nn.Module) -> ExpertShard | None:
    """The rank's part of a layer's experts; None if they are whole, or spread in a way that is not understood."""
    # Asked of every module with a forward of its own, before each call.
    forward, held = vars(module).get("forward"), module._parameters
    if forward is None or getattr(forward, "__code__", None) is None or held.keys() != set(NAMES):
        return None
    weights: list[Any] = [held[name] for name in NAMES]
    if not all(map(is_distributed, weights)):
        return None
    known = _looked_at.get(forward)
    same = known is not None and known.forward is type(module).forward
    if not same or known is None or any(ref() is not weight for ref, weight in zip(known.weights, weights, strict=True)):
        refs = tuple(weakref.ref(weight) for weight in weights)
        known = _looked_at[forward] = _Look(type(module).forward, refs, _group_of(module, forward, *weights))
    return None if known.group is None else ExpertShard(local_of(weights[0]), local_of(weights[1]), known.group)


def _group_of(module: nn.Module, forward: Any, gate_up: Any, down: Any) -> Any:
    """The ranks that hold parts of the experts; None if they are not as the plan of tensor parallelism has them."""
    held = plan_variables(module, forward)
    if held is None or type(held["self"]).__name__ != STYLE or held.get("is_expert_parallel"):
        return None
    mesh = held["mesh"]
    if mesh.ndim != 1 or not is_cut(down, mesh, 2) or not is_cut(gate_up, mesh, 1, halves=2):
        return None
    # Parts of one size: gate and up of a rank are the halves of its part.
    inner = down.shape[2]
    parts = local_of(down).shape[2] * mesh.size() == inner and local_of(gate_up).shape[1] * mesh.size() == 2 * inner
    return mesh.get_group() if parts and gate_up.shape[1] == 2 * inner else None
