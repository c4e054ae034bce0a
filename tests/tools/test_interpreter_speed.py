"""Shortcuts of the interpreter: types are shared, and mean what Triton's own mean."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tests.tools import interpreter_speed

pytestmark = pytest.mark.interpreter
TYPES = (tl.float32, tl.bfloat16, tl.int1, tl.int64, tl.float8e4nv, tl.pointer_type(tl.float16))


@pytest.mark.parametrize("element", TYPES, ids=str)
def test_types_are_shared(element: tl.dtype) -> None:
    one, other = tl.block_type(element, [4, 8]), tl.block_type(element, [8, 4])
    assert one is tl.block_type(element, [4, 8]) and one is not other and one != other
    assert one.element_ty == element and list(one.shape) == [4, 8] and one.numel == 32
    for type in (element, one):
        assert interpreter._get_np_dtype(type) == interpreter_speed._np_dtype_of(type)
    assert tl.block_type(tl.int8, [4, 8]) != one != tl.block_type(tl.pointer_type(element), [4, 8])


def test_a_shape_that_is_refused_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [3])


def test_what_two_types_are_computed_in() -> None:
    semantic = interpreter.interpreter_semantic
    for one in TYPES[:4]:
        for other in TYPES[:4]:
            for scalars in ((False, False), (True, False), (False, True)):
                given = (one, scalars[0], other, scalars[1], False)
                assert semantic.computation_type_impl(*given) == interpreter_speed._computation_type(semantic, *given)


@triton.jit
def shapes_kernel(x_ptr, out_ptr, COLUMNS: tl.constexpr, OTHER: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :])
    # Of one shape, of one that is repeated, and a scalar.
    x = x + x * tl.load(x_ptr + columns)[None, :] - tl.load(x_ptr)
    tl.store(out_ptr + rows[:, None] * COLUMNS + tl.arange(0, OTHER)[None, :], x.to(tl.bfloat16))


def test_values_of_several_shapes() -> None:
    x = torch.randn(4, 8)
    out = torch.zeros(4, 8, dtype=torch.bfloat16)
    for _ in range(2):
        shapes_kernel[(1,)](x, out, COLUMNS=8, OTHER=8)
        assert torch.equal(out, (x + x * x[0] - x[0, 0]).bfloat16())
    with pytest.raises(InterpreterError):
        shapes_kernel[(1,)](x, out, COLUMNS=8, OTHER=4)
