"""The repaired interpreter against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.interpreter
BF16 = torch.bfloat16


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + columns), tl.load(y_ptr + columns)
    tl.store(out_ptr + 0 * n + columns, x + y)
    tl.store(out_ptr + 1 * n + columns, x - y)
    tl.store(out_ptr + 2 * n + columns, x * y)
    tl.store(out_ptr + 3 * n + columns, -x)
    tl.store(out_ptr + 4 * n + columns, tl.maximum(x, y))
    tl.store(out_ptr + 5 * n + columns, tl.where(x < y, x, y * 1.5))
    tl.store(out_ptr + 6 * n + columns, tl.full([BLOCK], 0.1, x_ptr.dtype.element_ty))
    tl.store(out_ptr + 7 * n + columns, tl.abs(x))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_arithmetic(dtype):
    x, y = torch.randn(2, 64).to(dtype)
    out = torch.full((8, 64), math.nan, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, out, 64, BLOCK=64)
    tenth = torch.full_like(x, 0.1)
    want = [x + y, x - y, x * y, -x, torch.maximum(x, y), torch.where(x < y, x, y * 1.5), tenth, x.abs()]
    assert torch.equal(out, torch.stack(want))


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [BF16, torch.float16, torch.float32])
def test_rounding_to_nearest_even(source, target):
    # 1 + 2^-8 and 1 + 3 * 2^-8 are half way between two bf16 numbers; 3.39e38 rounds up to the largest finite bf16.
    edges = [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan, 65504.0, 3.39e38, 3.4e38, -1e-3]
    x = torch.cat((torch.tensor(edges), torch.randn(52))).to(source)
    out = torch.zeros(64, dtype=target)
    cast_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_cast_of_bf16_to_integers():
    x = torch.tensor([1.0, -2.5, 0.0, 200.0], dtype=BF16)
    out = torch.zeros(4, dtype=torch.int32)
    cast_kernel[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [1, -2, 0, 200]


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, k, BLOCK: tl.constexpr, HINTED: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HINTED:
        for start in tl.range(0, k, BLOCK, num_stages=2):
            acc = step(a_ptr, b_ptr, acc, start, k, rows)
    else:
        for start in range(0, k, BLOCK):
            acc = step(a_ptr, b_ptr, acc, start, k, rows)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def step(a_ptr, b_ptr, acc, start, k, rows):
    inner = start + rows
    a = tl.load(a_ptr + rows[:, None] * k + inner[None, :], mask=inner[None, :] < k, other=0.0)
    b = tl.load(b_ptr + rows[:, None] * k + inner[None, :], mask=inner[None, :] < k, other=0.0)
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("hinted", [False, True])
def test_dot_in_a_loop_with_a_run_time_bound(dtype, hinted):
    a, b = torch.randn(2, 16, 40).to(dtype)
    out = torch.full((16, 16), math.nan, dtype=dtype)
    matmul_kernel[(1,)](a, b, out, 40, BLOCK=16, HINTED=hinted)
    want = a.double() @ b.double().T
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@triton.jit
def count_kernel(bounds_ptr, out_ptr):
    count = 0
    for _ in range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1)):
        count += 1
    while count < tl.load(bounds_ptr + 2):
        count += 10
    tl.store(out_ptr, count)


def test_loops_bounded_by_loaded_numbers():
    out = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([3, 10, 25], dtype=torch.int32), out)
    assert out.item() == 27


@triton.jit
def masked_copy_kernel(x_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    ok = (columns < n) & (n >= m)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask=ok, other=-1), mask=columns < BLOCK)


@pytest.mark.parametrize(("m", "want"), [(2, [0, 1, 2, -1]), (4, [-1, -1, -1, -1])])
def test_a_scalar_comparison_in_a_mask(m, want):
    out = torch.zeros(4, dtype=torch.int64)
    masked_copy_kernel[(1,)](torch.arange(4), out, 3, m, BLOCK=4)
    assert out.tolist() == want


@triton.jit
def largest_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.maximum(tl.load(x_ptr) * float("nan"), -1.0))


def test_maximum_drops_nan():
    x, out = torch.randn(16, dtype=torch.float32), torch.zeros(2)
    largest_kernel[(1,)](x, out, BLOCK=16)
    assert out.tolist() == [x.max().item(), -1.0]


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def test_a_sum_in_bf16_is_refused():
    with pytest.raises(InterpreterError, match="convert it to fp32"):
        sum_kernel[(1,)](torch.ones(4, dtype=BF16), torch.zeros(1, dtype=BF16), BLOCK=4)
