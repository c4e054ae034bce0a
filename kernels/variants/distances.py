"""What of a score function depends on a query's and a key's position by their distance alone.

A tile has few distances and many pairs. The Gluon prefill computes such a part once a head and distance, and each pair looks
up its own: a learned bias of the distance is read from memory once for all queries that are as far from a key.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from hf_fastattn.kernels.variants.hooks import HOOKS
from hf_fastattn.kernels.variants.trace import TracedHook

# What is cheaper than these is computed for each pair as quickly as it would be looked up.
COSTLY = {
    *("index", "exp", "exp2", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu"),
    *("erf", "gelu", "pow", "div", "floor_divide", "remainder", "fmod"),
}  # fmt: skip
CONVERSIONS = ("_to_copy", "convert_element_type")
# Exact in fp32, in which it is looked up.
KEPT = (torch.float32, torch.float16, torch.bfloat16)


class Dependence(NamedTuple):
    """Of a value on positions: `by_distance`: on `q_idx - kv_idx` alone; `slopes` of q_idx and kv_idx if it is linear."""

    by_distance: bool
    slopes: tuple[int, int] | None = None


CONSTANT, DISTANCE, ANY = Dependence(True, (0, 0)), Dependence(True), Dependence(False)


class ScoreParts(NamedTuple):
    """A score as `factor * rest(score, ...)`; in `rest` the value of the node `by_distance`, if any, can be given."""

    by_distance: fx.Node | None
    rest: fx.Node
    factor: float


def score_parts(traced: TracedHook) -> ScoreParts:
    """The parts of a traced `score_mod`."""
    output = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    assert isinstance(output, fx.Node)
    if any(operation(node).endswith("_") for node in traced.graph.nodes if node.op == "call_function"):
        # What is written in place has another value later.
        return ScoreParts(None, output, 1.0)
    return ScoreParts(_by_distance(traced, output), *_last_factor(output))


def _last_factor(output: fx.Node) -> tuple[fx.Node, float]:
    """What a result is a positive multiple of, and the number."""
    if output.op == "call_function" and operation(output) == "mul":
        for own, other in (output.args, output.args[::-1]):
            positive = isinstance(other, int | float) and 0 < other < math.inf
            if positive and isinstance(own, fx.Node) and own.meta["val"].dtype == torch.float32:
                return own, float(other)  # type: ignore[arg-type]
    return output, 1.0


def _by_distance(traced: TracedHook, output: fx.Node) -> fx.Node | None:
    """The last value that takes costly operations on the distance, and is no part of another such value."""
    known: dict[fx.Node, Dependence] = {}
    costly: set[fx.Node] = set()
    for node, name in zip(traced.inputs, HOOKS[traced.hook], strict=True):
        slopes = {"q_idx": Dependence(False, (1, 0)), "kv_idx": Dependence(False, (0, 1)), "score": ANY}
        known[node] = slopes.get(name, CONSTANT)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            known[node] = CONSTANT
        elif node.op == "call_function":
            known[node] = _dependence(node, known)
            operands = node.all_input_nodes
            own = operation(node) in COSTLY and any(known[x] != CONSTANT for x in operands)
            if known[node].by_distance and (own or any(x in costly for x in operands)):
                costly.add(node)
    found = [node for node in costly if _may_be_cut(node, output) and any(user not in costly for user in node.users)]
    order = list(traced.graph.nodes)
    return max(found, key=order.index, default=None)


def _may_be_cut(node: fx.Node, output: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.shape and value.dtype in KEPT and node is not output


def _dependence(node: fx.Node, known: dict[fx.Node, Dependence]) -> Dependence:
    operands = [known[x] for x in node.all_input_nodes]
    if all(x == CONSTANT for x in operands):
        return CONSTANT
    slopes = _slopes(node, known)
    if slopes is not None:
        return Dependence(slopes[0] + slopes[1] == 0, slopes)
    return DISTANCE if all(x.by_distance for x in operands) else ANY


def _slopes(node: fx.Node, known: dict[fx.Node, Dependence]) -> tuple[int, int] | None:
    """Of sums, differences and conversions of positions."""
    given = [known[x].slopes if isinstance(x, fx.Node) else (0, 0) for x in node.args[:2]]
    if any(slopes is None for slopes in given) or node.kwargs.get("alpha", 1) != 1 or not _exact(node, known):
        return None
    (a, b), (c, d) = (*given, (0, 0))[:2]  # type: ignore[misc]
    if operation(node) in CONVERSIONS:
        return a, b
    found = {"neg": (-a, -b), "add": (a + c, b + d), "sub": (a - c, b - d), "rsub": (c - a, d - b)}
    return found.get(operation(node))


def _exact(node: fx.Node, known: dict[fx.Node, Dependence]) -> bool:
    """Whether the result is a whole number: fp32 rounds the sum of a position and a fraction."""
    dtype = node.meta["val"].dtype
    if dtype in (torch.int32, torch.int64):
        return True
    whole = all(float(x).is_integer() for x in node.args[:2] if isinstance(x, int | float))
    return dtype in (torch.float32, torch.float64) and whole and CONSTANT not in (known[x] for x in node.all_input_nodes)


def operation(node: fx.Node) -> str:
    """The name of a node's operation, as `translate.py` knows it."""
    target: Any = node.target
    return target._schema.name.split("::")[1] if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
