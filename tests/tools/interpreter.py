"""Repairs of Triton's CPU interpreter (`TRITON_INTERPRET=1`), so that it computes what a GPU computes.

What Triton 3.6.0 gets wrong with numpy 2.4; a star marks what 3.9.0 still does:

- a loop whose bound is known only at run time raises TypeError;
- * bf16 tensors are held as their bits, and `tl.dot`, arithmetic, comparisons and fma silently work on those integers;
- * fp32 to bf16 truncates, and bf16 to integers or fp16 converts the bits;
- * a comparison keeps the type of its operands, so a scalar one broadcast into a mask is no mask;
- bf16 constants do not exist;
- `tl.maximum` and `tl.minimum` propagate NaN, which a GPU drops.

- * fp32 to e4m3 is truncated, and NaN is lost on the way back.

A sum or scan over bf16 is refused rather than repaired: kernels accumulate in fp32. Other types of fp8 are left as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.tools.interpreter_speed import hasten

_original = {name: getattr(InterpreterBuilder, name) for name in ("binary_op", "unary_op", "create_dot", "cast_impl")}
_original_fma = InterpreterBuilder.create_fma
_original_clamp = InterpreterBuilder.create_clampf
_original_fp_to_fp = InterpreterBuilder.create_fp_to_fp
_original_patch_lang = interpreter._patch_lang
_original_patch_tensor = interpreter._patch_lang_tensor
_original_check = interpreter.ReduceScanOpInterface.check_tensor
# What of Triton's language the running launch has patched.
_patched: set[str] = set()


def repair() -> None:
    """Patches the interpreter; kernels may be defined before or after."""
    # A GPU does not warn of an overflow.
    np.seterr(all="ignore")
    InterpreterBuilder.binary_op = _binary_op
    InterpreterBuilder.unary_op = _unary_op
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fma = _create_fma
    InterpreterBuilder.create_clampf = _create_clampf
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value], dtype=np.float32))
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._patch_lang = _patch_lang
    # Sums and products of integers are computed once more in 64 bits, for an assertion that is made in debug mode only.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.ReduceScanOpInterface.check_tensor = _check_tensor
    hasten()


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: TensorHandle) -> np.ndarray:
    """The values of a bf16 tensor, in fp32."""
    return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """fp32 values as a bf16 tensor, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # In 64 bits, since the largest NaN would overflow.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
    if _is_bf16(lhs) and _is_bf16(rhs):
        out = op(_wide(lhs), _wide(rhs))
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else _narrow(out)
    result = _original["binary_op"](self, lhs, rhs, op)
    return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def _unary_op(self: Any, arg: TensorHandle, op: Callable) -> TensorHandle:
    return _narrow(op(_wide(arg))) if _is_bf16(arg) else _original["unary_op"](self, arg, op)


def _create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    return _narrow(_wide(x) * _wide(y) + _wide(z)) if _is_bf16(x) else _original_fma(self, x, y, z)


def _create_clampf(self: Any, arg: TensorHandle, low: TensorHandle, high: TensorHandle, nan: Any) -> TensorHandle:
    if _is_bf16(arg):
        return _narrow(np.clip(_wide(arg), _wide(low), _wide(high)))
    return _original_clamp(self, arg, low, high, nan)


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *options: Any) -> TensorHandle:
    if not _is_bf16(a):
        return _original["create_dot"](self, a, b, acc, *options)
    out = np.matmul(_wide(a), _wide(b)) + acc.data
    return TensorHandle(out.astype(acc.data.dtype), acc.dtype.scalar)


def _to_e4m3(values: np.ndarray) -> TensorHandle:
    """Numbers as e4m3, rounded to the nearest, and the largest instead of what is larger, as a GPU does."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448.0, 448.0)
    return TensorHandle(wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


def _fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
    if dst_type.scalar == tl.float8e4nv:
        return _to_e4m3(src.data)
    if src.dtype.scalar == tl.float8e4nv:
        wide = torch.from_numpy(np.ascontiguousarray(src.data)).view(torch.float8_e4m3fn).float().numpy()
        return TensorHandle(wide.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
    return _original_fp_to_fp(self, src, dst_type, rounding)


def _cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        return src if _is_bf16(src) else _narrow(src.data.astype(np.float32))
    if not _is_bf16(src):
        return _original["cast_impl"](self, src, dst_type)
    values = _wide(src) != 0 if dst_type.scalar == tl.int1 else _wide(src).astype(interpreter._get_np_dtype(dst_type))
    return TensorHandle(values, dst_type.scalar)


def _patch_lang(fn: Callable) -> Any:
    """Once a launch: for each function that a kernel calls Triton looks through all of its language again."""
    needed = _languages(fn)
    if _patched and needed <= _patched:
        return interpreter._LangPatchScope()
    outermost = not _patched
    scope = _original_patch_lang(fn)
    _patched.update(needed)
    if outermost:
        restore = scope.restore
        scope.restore = lambda: (restore(), _patched.clear())
    return scope


@functools.cache
def _languages(fn: Callable) -> frozenset[str]:
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _original_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _check_tensor(self: Any, tensors: tuple) -> None:
    _original_check(self, tensors)
    if any(tensor.dtype.scalar == tl.bfloat16 for tensor in tensors):
        raise TypeError("the interpreter cannot reduce or scan a bf16 tensor; convert it to fp32 first")
