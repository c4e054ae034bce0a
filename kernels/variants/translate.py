"""A traced hook as the source text of a `@triton.jit` function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hf_fastattn.kernels.variants import views
from hf_fastattn.kernels.variants.distances import operation, score_parts
from hf_fastattn.kernels.variants.elementwise import NAMES, elementwise
from hf_fastattn.kernels.variants.hooks import HOOKS, VECTORS
from hf_fastattn.kernels.variants.reductions import REDUCTIONS, columns
from hf_fastattn.kernels.variants.trace import TracedHook, VariantError, made_inside
from hf_fastattn.kernels.variants.values import TYPES, Body, Index, Indices, Value, cast, literal, remembered, reshape

# Most elements of a tensor whose offsets fit in 32 bits.
MOST_IN_32_BITS = 2**31 - 1
WHAT_WORKS = (
    "elementwise arithmetic, comparisons, torch.where, look-ups table[h, q_idx] in tensors, and in transforms slices, "
    "torch.cat, torch.roll, views, sums and means over head_dim can be translated; a @triton.jit function, or "
    "backend='reference', can do more"
)


def translatable(name: str) -> bool:
    """Whether operations of this name need no decomposition."""
    known = (NAMES, views.VIEWS, views.RESHAPES, REDUCTIONS, views.CONSTANTS, ("arange", "expand"))
    return any(name in names for names in known)


def all_translatable(traced: TracedHook) -> bool:
    """Whether no operation needs to be decomposed."""
    called = [node for node in traced.graph.nodes if node.op == "call_function"]
    return all(name == "getitem" or translatable(name) for name in map(operation, called))


def translate(traced: TracedHook, number_of: Callable[[Tensor], int], head_dim: int) -> str:
    """The source of a function of the hook's name.

    Its arguments are those of the hook and `tensors`, pointers to what it reads. Of a score or mask `score`, `b`, `h`,
    `q_idx` and `kv_idx` are blocks that broadcast to `[M, N]`; of a transform the vectors are `[M, BLOCK_D]`, in fp32, and
    the indices `[M, 1]` or numbers.

    Args:
        number_of: the place of a tensor in `tensors`.

    Raises:
        VariantError: an operation has no translation.
    """
    names = HOOKS[traced.hook]
    vector = names[0] in VECTORS
    body = Body()
    result = _Translation(traced, body, number_of, head_dim).result()
    if vector:
        place = columns(body, head_dim)
        name = cast(body, result.at((place,)), result.dtype, torch.float32)
        last = f"tl.broadcast_to(tl.where({place} < {head_dim}, {name}, 0.0), x.shape)"
    else:
        last = cast(body, result.at(()), result.dtype, torch.bool if traced.hook == "mask_mod" else torch.float32)
        if traced.hook == "score_mod":
            last = f"tl.broadcast_to({last}, score.shape)"
        elif traced.hook == "sink":
            last = f"tl.broadcast_to({last}, h.shape)"
    arguments = ", ".join(("x", *names[1:]) if vector else names)
    lines = [f"def {traced.hook}({arguments}, tensors):", *(f"    {line}" for line in body.lines), f"    return {last}"]
    return "@triton.jit\n" + "\n".join(lines) + "\n"


def translate_parts(traced: TracedHook, number_of: Callable[[Tensor], int], head_dim: int) -> tuple[str, float]:
    """Of a `score_mod` what the Gluon prefill calls: the source of its parts, and the factor; see `distances.py`.

    `score_by_distance(b, h, distance, tensors)` is there if a part depends on the distance alone; `score_rest` gets its
    value as `by_distance`. If the function has no parts there is no source.
    """
    cut, rest, factor = score_parts(traced)
    lines = []
    if cut is not None:
        body = Body()
        result = _Translation(traced, body, number_of, head_dim).result(
            cut, {"q_idx": "distance", "kv_idx": "(distance * 0)"}
        )
        last = cast(body, result.at(()), result.dtype, torch.float32)
        lines += ["@triton.jit", "def score_by_distance(b, h, distance, tensors):", *(f"    {line}" for line in body.lines)]
        lines += [f"    return tl.broadcast_to({last}, distance.shape)", "", ""]
    elif factor == 1.0:
        return "", 1.0
    body = Body()
    result = _Translation(traced, body, number_of, head_dim, given=cut).result(rest)
    last = cast(body, result.at(()), result.dtype, torch.float32)
    arguments = "score, by_distance, b, h, q_idx, kv_idx, tensors"
    lines += ["@triton.jit", f"def score_rest({arguments}):", *(f"    {line}" for line in body.lines)]
    lines += [f"    return tl.broadcast_to({last}, score.shape)", ""]
    return "\n".join(lines), factor


class _Translation:
    """One walk over a graph; `values` holds what each node gives, of which that of the node `given` is an argument."""

    def __init__(
        self, traced: TracedHook, body: Body, number_of: Callable[[Tensor], int], head_dim: int, given: fx.Node | None = None
    ) -> None:
        self.traced = traced
        self.given = given
        self.body = body
        self.number_of = number_of
        self.head_dim = head_dim
        self.values: dict[fx.Node, Any] = {}

    def result(self, wanted: fx.Node | None = None, renamed: dict[str, str] | None = None) -> Value:
        """What the function returns, or the value of a node; its arguments may have other names."""
        for node, name in zip(self.traced.inputs, HOOKS[self.traced.hook], strict=True):
            self.values[node] = self._input(name, (renamed or {}).get(name, name))
        for node in self.traced.graph.nodes:
            if node is self.given:
                self.values[node] = Value((), torch.float32, lambda index: "by_distance")
            elif node.op == "get_attr":
                self.values[node] = self._outside(node)
            elif node.op == "call_function":
                self._call(node)
        output = next(node for node in self.traced.graph.nodes if node.op == "output")
        return self.values[wanted or output.args[0]]

    def _input(self, name: str, argument: str) -> Value:
        if name not in VECTORS:
            return Value((), torch.float32 if name == "score" else torch.int32, lambda index: argument)
        own = columns(self.body, self.head_dim)

        def at(index: Indices) -> str:
            place = index[0]
            if place == own:
                return "x"
            column = self.body.let(f"tl.full([1, 1], {place}, tl.int32)") if isinstance(place, int) else place
            column = self.body.let(f"{column}.to(tl.int32)")
            return self.body.let(f"dev.element(x, {column})")

        return remembered((self.head_dim,), torch.float32, at)

    def _outside(self, node: fx.Node) -> Value:
        """A tensor read from memory, at any index: NaN or 0 outside of it."""
        tensor = self.traced.tensors[str(node.target)]
        if not tensor.shape and made_inside(self.traced.graph, str(node.target)):
            return Value((), tensor.dtype, lambda index: self.body.let(literal(tensor.item(), tensor.dtype)))
        if tensor.dtype not in TYPES:
            raise self._error(node, f"reads a tensor of {tensor.dtype}; Triton reads {', '.join(map(str, TYPES))}")
        pointer = f"tensors[{self.number_of(tensor)}]"
        reach = sum(size * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        integer = "tl.int32" if reach <= MOST_IN_32_BITS else "tl.int64"
        other = "float('nan')" if tensor.dtype.is_floating_point else "0"

        def at(index: Indices) -> str:
            offset, inside = self._offset(tensor, index, integer)
            if not inside:
                return self.body.let(f"tl.load({pointer} + {offset})")
            loaded = self.body.let(f"tl.load({pointer} + {offset}, mask={' & '.join(inside)}, other={other})")
            return self.body.let(f"{loaded} != 0") if tensor.dtype == torch.bool else loaded

        return remembered(tensor.shape, tensor.dtype, at)

    def _offset(self, tensor: Tensor, index: Indices, integer: str) -> tuple[Index, list[str]]:
        """Where an element lies, and the conditions under which there is one."""
        body, offset, inside = self.body, 0, []
        total: Index = offset
        for i, size, stride in zip(index, tensor.shape, tensor.stride(), strict=True):
            if isinstance(i, str):
                inside.append(body.let(f"({i} >= 0) & ({i} < {size})"))
                i = body.let(f"{i}.to({integer})")
            total = body.sum_of(total, body.times(i, stride))
        return total, inside

    def _call(self, node: fx.Node) -> None:
        name = _name(node)
        args = fx.node.map_arg(node.args, lambda n: self.values[n])
        options = dict(fx.node.map_arg(node.kwargs, lambda n: self.values[n]))
        try:
            self.values[node] = self._value(node, name, args, options)
        except (KeyError, TypeError) as error:
            raise self._error(node, f"uses {_readable(node, error)}, which has no translation to Triton") from error
        if name + "_" == _name(node, stripped=False) and isinstance(node.args[0], fx.Node):
            # What a decomposition writes in place; users may not.
            self.values[node.args[0]] = self.values[node]

    def _value(self, node: fx.Node, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        body = self.body
        if name == "getitem":
            return args[0][args[1]]
        if not translatable(name):
            raise KeyError(name)
        if name in views.VIEWS:
            return views.VIEWS[name](body, *args, **options)
        value = node.meta["val"]
        shape, dtype = tuple(value.shape), value.dtype
        if name in NAMES:
            return elementwise(body, name, list(args), options, shape, dtype)
        if name in views.RESHAPES:
            return reshape(body, args[0], shape)
        if name == "expand":
            return views.expand(body, args[0], shape)
        if name in REDUCTIONS and HOOKS[self.traced.hook][0] in VECTORS:
            return REDUCTIONS[name](body, *args, dtype=dtype)
        if name in views.CONSTANTS:
            return views.constant(body, name, args, shape, dtype)
        if name == "arange":
            return views.arange(body, args, dtype)
        raise KeyError(name)

    def _error(self, node: fx.Node, what: str) -> VariantError:
        line = f" ({node.stack_trace})" if node.stack_trace else ""
        return VariantError(f"{self.traced.hook}{line} {what}; {WHAT_WORKS}")


def _name(node: fx.Node, stripped: bool = True) -> str:
    name = operation(node)
    return name[:-1] if stripped and name.endswith("_") and not name.endswith("__") else name


def _readable(node: fx.Node, error: Exception) -> str:
    what = str(error.args[0]) if error.args else ""
    return f"{node.target}" + (f" ({what})" if what and what != _name(node) else "")
