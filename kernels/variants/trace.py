"""A hook's function as a graph of PyTorch's operations, with what it reads from outside.

`torch.fx` runs the function once on scalars (vectors of head_dim for transforms) and notes the operations. What depends on
a value, such as `if q_idx > 3`, cannot be noted and is refused, with the line of the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from hf_fastattn.kernels.variants.captured import captured
from hf_fastattn.kernels.variants.hooks import HOOKS, VECTORS
from hf_fastattn.kernels.variants.user_lines import InPlaceWriteError, LeavesPyTorchError, NotedLines, line_of_error


class VariantError(ValueError):
    """A hook of a variant that cannot be used: which, where, and what would work."""


@dataclass(frozen=True)
class TracedHook:
    """One hook, traced.

    Attributes:
        hook: its name in `HOOKS`.
        graph: the operations; inputs in the order of `HOOKS`.
        tensors: what the function reads from outside, by the target of the graph's `get_attr` nodes.
    """

    hook: str
    graph: fx.Graph
    tensors: dict[str, Tensor]

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def reads_row(self) -> bool:
        """Whether the result depends on `b`."""
        return self.reads("b")

    def reads(self, name: str) -> bool:
        """Whether the result depends on the argument of this name."""
        return any(node.users for node, own in zip(self.inputs, HOOKS[self.hook], strict=True) if own == name)


def trace(
    hook: str,
    function: Callable[..., Any],
    head_dim: int,
    device: torch.device,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> TracedHook:
    """The graph of `function`, called as `hook`.

    Args:
        head_dim: length of the vectors that transforms take.
        device: where the tensors that it reads have to be.
        decompositions: for operations to be noted as others.

    Raises:
        VariantError: the function fails, depends on values, writes in place, reads tensors elsewhere or gives a result of
            the wrong shape or type.
    """
    examples = [_example(name, head_dim, device) for name in HOOKS[hook]]
    try:
        with torch.no_grad(), TransformGetItemToIndex(), NotedLines(), fx_traceback.preserve_node_meta():
            module = make_fx(function, decomposition_table=decompositions)(*examples)
    except Exception as error:
        read = (value for value in captured(function) if isinstance(value, Tensor))
        elsewhere = next((value for value in read if not _on(value, device)), None)
        if elsewhere is not None and "device" in str(error):
            raise VariantError(_moved(hook, elsewhere, device)) from error
        raise VariantError(f"{hook}{_at(line_of_error(error))} {_explained(error)}") from error
    tensors = {node.target: getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"}
    traced = TracedHook(hook, module.graph, tensors)
    _check_result(traced, head_dim)
    for name, tensor in tensors.items():
        if not _on(tensor, device) and not made_inside(module.graph, name):
            raise VariantError(_moved(hook, tensor, device))
    return traced


def _moved(hook: str, tensor: Tensor, device: torch.device) -> str:
    return (
        f"{hook} reads a tensor of shape {tuple(tensor.shape)} on {tensor.device}, but attention runs on {device}; "
        f"move it there with .to({str(device)!r})"
    )


def _on(tensor: Tensor, device: torch.device) -> bool:
    """Whether it lies there; a device without a number is any of its kind."""
    return tensor.device == device or (device.index is None and tensor.device.type == device.type)


def made_inside(graph: fx.Graph, name: str) -> bool:
    """Whether a tensor of the graph is a number that the function makes itself, as by `torch.tensor(31)`."""
    nodes = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
    targets = [str(user.target) for node in nodes for user in node.users]
    return bool(targets) and all("lift_fresh" in target for target in targets)


def _example(name: str, head_dim: int, device: torch.device) -> Tensor:
    if name in VECTORS:
        return torch.zeros(head_dim, device=device)
    return torch.zeros((), dtype=torch.float32 if name == "score" else torch.int32, device=device)


def _at(line: str) -> str:
    return f" ({line})" if line else ""


def _explained(error: Exception) -> str:
    text = str(error).split("\n")[0]
    if isinstance(error, InPlaceWriteError):
        return f"{text}; write x = x + y instead of x += y"
    if isinstance(error, LeavesPyTorchError):
        return f"{text}; use operations of PyTorch"
    if "tracing tensor" in text or "data-dependent" in text or "_local_scalar_dense" in text:
        return (
            "depends on the value of a tensor (in an if, a loop, an int() or an index of mixed kinds); "
            "use torch.where(condition, a, b), and index tensors with tensors and integers only"
        )
    return f"fails with {type(error).__name__}: {text}; it is called with scalar tensors, transforms with vectors [head_dim]"


def _check_result(traced: TracedHook, head_dim: int) -> None:
    hook, vector = traced.hook, HOOKS[traced.hook][0] in VECTORS
    want = (head_dim,) if vector else ()
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise VariantError(f"{hook} returns {result!r}, expected a tensor that depends on its arguments")
    value = result.meta["val"]
    if tuple(value.shape) != want:
        expected = f"a vector [{head_dim}], as it was given" if vector else "a scalar tensor, one for each call"
        raise VariantError(f"{hook} returns a tensor of shape {tuple(value.shape)}, expected {expected}")
    if (hook == "mask_mod") != (value.dtype == torch.bool):
        expected = "a bool: True where the query sees the key" if hook == "mask_mod" else "a number"
        raise VariantError(f"{hook} returns {value.dtype}, expected {expected}")
