"""PyTorch's elementwise operations as expressions of Triton, with PyTorch's types and rounding of integers."""

from __future__ import annotations

from typing import Any

import torch

from hf_fastattn.kernels.variants.values import Body, Indices, Value, broadcast, cast, literal, remembered

# `{0}`, `{1}` and `{2}` are the operands in the type of the result; 16-bit floating-point numbers are computed in fp32.
ARITHMETIC = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "square": "{0} * {0}",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "clamp_min": "tl.maximum({0}, {1})",
    "clamp_max": "tl.minimum({0}, {1})",
    "relu": "tl.maximum({0}, 0)",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log10": "tl.log2({0}) * 0.30102999566398119521",
    "log1p": "dev.log1p({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "1.0 / tl.sqrt({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "tanh": "dev.tanh({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "erf": "tl.erf({0})",
    "reciprocal": "1.0 / {0}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "bitwise_left_shift": "{0} << {1}",
    "bitwise_right_shift": "{0} >> {1}",
    "__lshift__": "{0} << {1}",
    "__rshift__": "{0} >> {1}",
    "clone": "{0}",
    "_to_copy": "{0}",
    "convert_element_type": "{0}",
}
# Of floating-point numbers; integers stay as they are.
ROUNDING = {
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "trunc": "dev.truncate({0})",
    "round": "dev.round_to_even({0})",
}
# Operands in the type that both can be converted to.
COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "isnan": "{0} != {0}",
    "isinf": "tl.abs({0}) == float('inf')",
}
# Operands as bools.
LOGIC = {
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_xor": "{0} ^ {1}",
    "logical_not": "{0} == 0",
}
GELU = {
    "none": "0.5 * {0} * (1.0 + tl.erf({0} * 0.70710678118654752440))",
    "tanh": "0.5 * {0} * (1.0 + dev.tanh(0.79788456080286535588 * ({0} + 0.044715 * {0} * {0} * {0})))",
}
OTHERS = ("where", "clamp", "div", "floor_divide", "remainder", "fmod", "pow", "bitwise_not", "sign", "gelu")
NAMES = {*ARITHMETIC, *ROUNDING, *COMPARISONS, *LOGIC, *OTHERS}


def elementwise(
    body: Body, name: str, operands: list[Any], options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Value:
    """The result of an operation in `NAMES`, of `shape` and `dtype`.

    Args:
        operands: `Value`s and Python numbers.
        options: keyword arguments.

    Raises:
        KeyError: a form of the operation that has no translation.
    """
    if name == "where":
        return _where(body, operands, shape, dtype)
    if options.get("alpha", 1) != 1:
        operands = [operands[0], _scaled(body, operands[1], options["alpha"], dtype)]
    if name == "clamp":
        operands, name = _bounds(operands + [None] * (3 - len(operands)), options)
    expression = _expression(name, operands, options, dtype)
    if name in LOGIC:
        inner = torch.bool
    elif name in COMPARISONS:
        inner = wide(_promoted(operands))
    elif name in ("_to_copy", "convert_element_type"):
        operands, inner = operands[:1], dtype
    else:
        inner = wide(dtype)
    result = torch.bool if name in COMPARISONS or name in LOGIC else inner

    def at(index: Indices) -> str:
        names = [operand_at(body, operand, index, inner) for operand in operands]
        return cast(body, body.let(expression.format(*names)), result, dtype)

    return remembered(shape, dtype, at)


def operand_at(body: Body, operand: Any, index: Indices, dtype: torch.dtype) -> str:
    """An element of a `Value` or a Python number, in `dtype`."""
    if isinstance(operand, Value):
        return cast(body, operand.at(broadcast(index, operand.shape)), operand.dtype, dtype)
    return body.let(literal(operand, dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which results of `dtype` are computed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _promoted(operands: list[Any]) -> torch.dtype:
    """PyTorch's common type; a scalar tensor or number does not widen a vector of the same kind."""
    examples = [torch.empty((1,) * len(x.shape), dtype=x.dtype) if isinstance(x, Value) else x for x in operands]
    return torch.result_type(*examples) if len(examples) == 2 else examples[0].dtype


def _where(body: Body, operands: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> Value:
    def at(index: Indices) -> str:
        condition = operand_at(body, operands[0], index, torch.bool)
        a, b = (operand_at(body, operand, index, dtype) for operand in operands[1:])
        return body.let(f"tl.where({condition}, {a}, {b})")

    return remembered(shape, dtype, at)


def _scaled(body: Body, operand: Any, alpha: float, dtype: torch.dtype) -> Any:
    if not isinstance(operand, Value):
        return operand * alpha
    return elementwise(body, "mul", [operand, alpha], {}, operand.shape, dtype)


def _bounds(operands: list[Any], options: dict[str, Any]) -> tuple[list[Any], str]:
    x, low, high = operands[0], options.get("min", operands[1]), options.get("max", operands[2])
    if low is None:
        return [x, high], "minimum"
    return ([x, low], "maximum") if high is None else ([x, low, high], "clamp")


def _expression(name: str, operands: list[Any], options: dict[str, Any], dtype: torch.dtype) -> str:
    real = dtype.is_floating_point
    if name == "clamp":
        return "tl.minimum(tl.maximum({0}, {1}), {2})"
    if name in ROUNDING:
        return ROUNDING[name] if real else "{0}"
    if name in ("div", "floor_divide", "remainder", "fmod"):
        return _division(name, operands[1], options.get("rounding_mode"), real)
    if name == "pow":
        return _power(operands, real)
    if name == "gelu":
        return GELU[options.get("approximate", "none")]
    if name == "bitwise_not":
        return "{0} == 0" if dtype == torch.bool else "~{0}"
    if name == "sign":
        return "tl.where({0} > 0, 1, tl.where({0} < 0, -1, 0))"
    return {**ARITHMETIC, **COMPARISONS, **LOGIC}[name]


def _division(name: str, divisor: Any, mode: str | None, real: bool) -> str:
    floors = name in ("remainder", "floor_divide") or mode == "floor"
    if floors and not real and isinstance(divisor, int) and divisor > 0 and divisor & (divisor - 1) == 0:
        # One instruction instead of ten; both round down, whatever the sign.
        return f"{{0}} & {divisor - 1}" if name == "remainder" else f"{{0}} >> {divisor.bit_length() - 1}"
    if name == "remainder":
        return "dev.floor_remainder_float({0}, {1})" if real else "dev.floor_remainder({0}, {1})"
    if name == "fmod":
        return "{0} - dev.truncate({0} / {1}) * {1}" if real else "{0} % {1}"
    if mode == "floor" or name == "floor_divide":
        return "tl.floor({0} / {1})" if real else "dev.floor_divide({0}, {1})"
    if mode == "trunc":
        return "dev.truncate({0} / {1})" if real else "{0} // {1}"
    return "{0} / {1}"


def _power(operands: list[Any], real: bool) -> str:
    base, exponent = operands
    if isinstance(exponent, int | float) and exponent == int(exponent) and 0 < exponent <= 8:
        return " * ".join(["{0}"] * int(exponent))
    if isinstance(exponent, int | float) and real and exponent in (0.5, -0.5, -1, -2):
        return {0.5: "tl.sqrt({0})", -0.5: "1.0 / tl.sqrt({0})", -1: "1.0 / {0}", -2: "1.0 / ({0} * {0})"}[exponent]
    if isinstance(base, int | float) and base > 0 and real:
        return "tl.exp2({1} * tl.log2({0}))"
    raise KeyError("pow")
