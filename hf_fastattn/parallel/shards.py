"""What a rank holds of a module that Transformers' tensor parallelism has spread over processes, and what calling it does.

Transformers replaces `forward` of a sharded module by a function that calls the original one on the shard and then sums or
gathers over the ranks; weights are DTensors. The function's variables say which style of the plan it belongs to. A style
that is not known here, or known with other layouts, is not understood: `shard_of` has None for it, `understood.py` a
reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_fastattn.wrappers import RANKS as PLAN
from hf_fastattn.wrappers import is_called_as_ever, is_class_forward, origin_of

# Kinds of shards. Calling a layer of which a rank holds
COLUMNS = "columns"  # some output features: gives these;
ROWS = "rows"  # some input features: gives the sum of all ranks' products, and then the bias;
GATHERED = "gathered"  # some output features: gives those of all ranks, side by side;
VOCABULARY = "vocabulary"  # some rows of an embedding: gives the sum of what all ranks find.

# Dimension of the weight that is cut.
CUT = {COLUMNS: 0, ROWS: 1, GATHERED: 0, VOCABULARY: 0}


class Shard(NamedTuple):
    """A rank's part of a layer.

    Attributes:
        weight: the part itself, `[N, K]`, no copy.
        bias: its part, or for `ROWS` the whole one, to be added to the sum once.
        size: of the whole weight along the dimension that is cut.
        group: the process group of the ranks that hold the other parts.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    size: int
    group: Any


def local_of(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; any other tensor itself."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    kind: Any = type(tensor)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.")


def shard_of(module: nn.Module) -> Shard | None:
    """The rank's part of a linear layer or an embedding; None if it is whole, or not understood."""
    # Asked of every module of a model, before each call: hardly any has a forward of its own.
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__code__", None) is None:
        return None
    weight: Any = module._parameters.get("weight")
    bias: Any = module._parameters.get("bias")
    if not is_distributed(weight) or not is_called_as_ever(module):
        return None
    looked_at = _looked_at.get(forward)
    if looked_at is None or not looked_at.is_of(type(module).forward, weight, bias):
        looked_at = _looked_at[forward] = _Look(
            type(module).forward, weakref.ref(weight), None if bias is None else weakref.ref(bias),
            *_understood(module, forward, weight, bias),
        )  # fmt: skip
    if looked_at.kind is None:
        return None
    return Shard(looked_at.kind, local_of(weight), local_of(bias), looked_at.size, looked_at.group)


class _Look(NamedTuple):
    """What was found of a module, for as long as its class's forward, weight and bias are what they were."""

    forward: Any
    weight: weakref.ref[Any]
    bias: weakref.ref[Any] | None
    kind: str | None
    size: int
    group: Any

    def is_of(self, forward: Any, weight: Any, bias: Any) -> bool:
        same = self.forward is forward and self.weight() is weight
        return same and (bias is None if self.bias is None else self.bias() is bias)


# By the function that stands in the place of a module's forward. What it finds in a module takes the host microseconds.
_looked_at: weakref.WeakKeyDictionary[Any, _Look] = weakref.WeakKeyDictionary()


def _understood(module: nn.Module, forward: Any, weight: Any, bias: Any) -> tuple[str | None, int, Any]:
    """Kind of a module's shard, None if it is not understood; size of the dimension that is cut; group of the ranks."""
    nothing = None, 0, None
    held = plan_variables(module, forward)
    kind = None if held is None else _kind(type(module), held["self"])
    if held is None or kind is None:
        return nothing
    mesh = held["mesh"]
    if mesh.ndim != 1 or not is_cut(weight, mesh, CUT[kind]):
        return nothing
    if bias is not None and not (is_cut(bias, mesh, 0) if kind != ROWS else _is_same_everywhere(bias, mesh)):
        return nothing
    size = weight.shape[CUT[kind]]
    if not local_of(weight).numel() or (kind == GATHERED and size % mesh.size()):
        return nothing
    return nothing if getattr(module, "max_norm", None) is not None else (kind, size, mesh.get_group())


def shards_of(model: nn.Module) -> Iterator[Shard]:
    """The parts that this rank holds."""
    return (shard for module in model.modules() if (shard := shard_of(module)) is not None)


def plan_variables(module: nn.Module, forward: Any) -> dict[str, Any] | None:
    """What the function that a style of the plan put in the place of the class's forward refers to."""
    code = getattr(forward, "__code__", None)
    # By its code, not by its name: `functools.wraps` gives that to anything.
    if code is None or code.co_name != "tp_forward" or origin_of(forward) != PLAN:
        return None
    held = variables_of(forward)
    if not {"self", "module", "mesh", "original_forward"} <= held.keys() or held["module"] is not module:
        return None
    return held if is_class_forward(module, held["original_forward"]) else None


def variables_of(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _kind(kind: Any, style: Any) -> str | None:
    """Which part a style leaves a rank of a layer of this class."""
    # Not before: it imports DTensors.
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Cut

    name = type(style).__name__ if type(style).__module__ == PLAN else ""
    if not getattr(style, "use_local_output", False):
        return None
    if name == "EmbeddingParallel" and kind is nn.Embedding:
        return VOCABULARY if style.shard_dim == 0 else None
    taken, given = getattr(style, "input_layouts", None), getattr(style, "output_layouts", None)
    if name == "RowwiseParallel" and kind is nn.Embedding:
        return VOCABULARY if (taken, given) == (Replicate(), Replicate()) else None
    if kind is not nn.Linear:
        return None
    if name == "ColwiseParallel" and taken == Replicate():
        return COLUMNS if given == Cut(-1) else GATHERED if given == Replicate() else None
    return ROWS if name == "RowwiseParallel" and (taken, given) == (Cut(-1), Replicate()) else None


def is_cut(tensor: Any, mesh: Any, dim: int, halves: int = 1) -> bool:
    """Whether it is a DTensor over the mesh, cut along `dim` and nothing else; of each of so many `halves` as much."""
    if not is_distributed(tensor) or tensor.device_mesh != mesh or len(tensor.placements) != 1:
        return False
    placement = tensor.placements[0]
    if halves > 1:
        fits = type(placement).__name__ == "_StridedShard" and placement.split_factor == halves
    else:
        fits = type(placement).__name__ == "Shard"
    return fits and placement.dim % tensor.ndim == dim


def _is_same_everywhere(tensor: Any, mesh: Any) -> bool:
    if not is_distributed(tensor):
        return True
    return tensor.device_mesh == mesh and all(placement.is_replicate() for placement in tensor.placements)
