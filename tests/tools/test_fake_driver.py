"""A small kernel through the fake driver: one specialisation a target, its resources, its shared memory refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from tests.tools.fake_driver import fake_driver
from tests.tools.resources import resources
from tests.tools.targets import TARGETS


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, k, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, k, BLOCK, num_stages=STAGES):
        inner = start + rows
        a = tl.load(a_ptr + rows[:, None] * k + inner[None, :])
        b = tl.load(b_ptr + inner[:, None] * BLOCK + rows[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], acc.to(out_ptr.dtype.element_ty))


def launch(k: int, stages: int = 2, block: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
    a, b, out = torch.zeros(block, k, dtype=dtype), torch.zeros(k, block, dtype=dtype), torch.zeros(block, block)
    matmul_kernel[(1,)](a, b, out, k, BLOCK=block, STAGES=stages)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_resources(target):
    before = driver._active
    with fake_driver(target) as fake:
        launch(k=128)
        launch(k=256)
        [compiled] = fake.compiled()
        launch(k=100)
        assert len(fake.compiled()) == 2, "a length that 16 does not divide is another specialisation"
    assert driver._active is before and not matmul_kernel.device_caches
    used = resources(compiled, target)
    assert used.kernel == "matmul_kernel" and used.warps == 4 and used.spilled_bytes == 0
    assert 32 < used.registers <= 255
    assert 2 * 64 * 64 * 2 <= used.shared_memory <= target.shared_memory
    assert not used.uses_tf32


def test_spills_are_seen():
    with fake_driver(TARGETS["sm_80"]) as fake:
        a = b = out = torch.zeros(128, 128, dtype=torch.bfloat16)
        matmul_kernel[(1,)](a, b, out, 128, BLOCK=128, STAGES=2, num_warps=4, maxnreg=64)
        [compiled] = fake.compiled()
    used = resources(compiled, TARGETS["sm_80"])
    assert used.registers <= 64 and used.spilled_bytes > 32


def test_too_much_shared_memory_is_refused():
    with fake_driver(TARGETS["sm_80"]), pytest.raises(OutOfResources, match="shared memory"):
        launch(k=1024, block=128, stages=8)


def test_tf32_is_seen():
    with fake_driver(TARGETS["sm_80"]) as fake:
        launch(k=128, dtype=torch.float32)
        [compiled] = fake.compiled()
    assert resources(compiled, TARGETS["sm_80"]).uses_tf32
