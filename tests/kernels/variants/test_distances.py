"""Parts of score functions: what depends on the distance alone is found, and the parts make the function."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.variants import mods

CPU, SIZE = torch.device("cpu"), 32
TABLE = torch.randn(4, 2 * SIZE, generator=torch.Generator().manual_seed(3))
BY_DISTANCE = {
    "table": lambda s, b, h, q, k: s + TABLE[h, q - k],
    "table of 16 bits": lambda s, b, h, q, k: s + TABLE.bfloat16()[h, q - k],
    "moved": lambda s, b, h, q, k: s * 2 + TABLE[h, (q + 3) - (k + 2)],
    "backwards": lambda s, b, h, q, k: s + TABLE[h, SIZE - (q - k)],
    "no head": lambda s, b, h, q, k: s - TABLE[1, torch.abs(k - q)],
    "buckets": mods.distance_buckets,
    "decay": lambda s, b, h, q, k: s * torch.exp(-0.1 * (q.float() - k.float())),
    "used twice": lambda s, b, h, q, k: torch.maximum(s, TABLE[h, q - k]) + TABLE[h, q - k],
    "scaled": lambda s, b, h, q, k: (s + TABLE[h, q - k]) * 3.0,
    "and positions": lambda s, b, h, q, k: s + TABLE[h, q - k] * (q + k),
}
OTHERS = {
    "sum of positions": lambda s, b, h, q, k: s + TABLE[h, (q + k) // 2],
    "multiples": lambda s, b, h, q, k: s + TABLE[h, (q * 2 - k) % 7],
    "fractions": lambda s, b, h, q, k: s + torch.exp((q + 0.1) - k),
    "of the key": lambda s, b, h, q, k: s + TABLE[h, k],
    "cheap": lambda s, b, h, q, k: s + (q - k),
    "of the score": lambda s, b, h, q, k: s + torch.tanh(s * (q - k)),
}


@triton.jit
def parts_kernel(score_ptr, whole_ptr, parts_ptr, tensors, first, HOOKS: tl.constexpr, SIZE: tl.constexpr):
    m = tl.arange(0, SIZE)[:, None]
    n = tl.arange(0, SIZE)[None, :]
    score, h, q_idx = tl.load(score_ptr + m * SIZE + n), m % 4, m + first
    tl.store(whole_ptr + m * SIZE + n, HOOKS.score_mod(score, 1, h, q_idx, n, tensors))
    by_distance = 0.0
    if HOOKS.score_by_distance is not None:
        by_distance = HOOKS.score_by_distance(1, h, q_idx - n, tensors)
    rest = HOOKS.score_rest(score, by_distance, 1, h, q_idx, n, tensors)
    tl.store(parts_ptr + m * SIZE + n, rest * HOOKS.last_factor)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BY_DISTANCE)
def test_what_depends_on_the_distance_is_computed_by_it(name):
    compiled = compile_variant(Variant(score_mod=BY_DISTANCE[name]), 64, CPU)
    assert compiled.hooks.score_by_distance is not None
    assert_parts(compiled, first=SIZE - 1)


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is(name):
    assert compile_variant(Variant(score_mod=OTHERS[name]), 64, CPU).hooks.score_by_distance is None


@pytest.mark.interpreter
def test_a_softcap_comes_last():
    compiled = compile_variant(Variant(softcap=30.0), 64, CPU)
    assert compiled.hooks.score_by_distance is None and compiled.hooks.last_factor == 30.0
    assert_parts(compiled)


def assert_parts(compiled, first=0):
    scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    whole, parts = torch.empty(2, SIZE, SIZE)
    parts_kernel[(1,)](scores, whole, parts, compiled.tensors, first, compiled.hooks, SIZE)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    assert whole.isfinite().any() and not torch.equal(whole, scores)
