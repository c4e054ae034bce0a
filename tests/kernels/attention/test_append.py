"""[qk-norm] + RoPE + append in one kernel against the same steps in PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.attention import append, rope_reference
from tests.kernels.cases import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(
    tokens: int,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 64,
    rotary: int | None = None,
    page: int = 16,
    dtype: torch.dtype = BF16,
    norm: bool = False,
    unit_offset: bool = False,
    fused: bool = False,
    heads_first: bool = False,
    skipped: int = 0,
    spare: int = 0,
    device: str = "cpu",
) -> None:
    """Compares queries, keys and values; every slot that no token was given to has to stay NaN.

    Args:
        fused: q and k are slices of one projection, and v has its heads before its tokens.
        heads_first: pages lie in memory as `[N, G, P, D]`.
        skipped: leading tokens whose slot is -1.
        spare: unused pages before all others.
    """
    generator = torch.Generator(device).manual_seed(tokens + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    q, k, v = normal(tokens, heads + 2 * groups, dim).split((heads, groups, groups), 1)
    if fused:
        v = v.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    angles = normal(tokens, (rotary or dim) // 2).repeat(1, 2)
    cos, sin = angles.cos(), rope_reference.signed_sin(angles.sin())
    weights = {"q_norm": normal(dim), "k_norm": normal(dim), "eps": 1e-5} if norm else {}
    used = -(-tokens // page) + 2
    slots = torch.randperm(used * page, generator=torch.Generator().manual_seed(tokens))[:tokens].to(device)
    slots += spare * page
    # One page more in front: a write to slot -1 shows there.
    inner = (groups, page) if heads_first else (page, groups)
    whole = [torch.full((1 + spare + used, *inner, dim), math.nan, dtype=dtype, device=device) for _ in range(2)]
    whole = [x.transpose(1, 2) if heads_first else x for x in whole]
    pages = [x[1:] for x in whole]
    slots[:skipped] = -1
    got_q = append.rope_append(q, k, v, cos, sin, *pages, slots, unit_offset=unit_offset, **weights)

    wants = steps(q, k, cos, sin, weights, unit_offset, torch.float64)
    plains = steps(q, k, cos, sin, weights, unit_offset, dtype)
    kept = slots[skipped:]
    got_k, got_v = (x[kept // page, kept % page] for x in pages)
    assert_close("queries", got_q, plains[0], wants[0])
    assert_close("keys", got_k, plains[1][skipped:], wants[1][skipped:])
    assert torch.equal(got_v, v[skipped:])
    untouched = torch.ones(1 + spare + used, page, dtype=torch.bool, device=device)
    untouched[1 + kept // page, kept % page] = False
    # Too many to look at.
    untouched[1 : 1 + spare] = False
    assert all(bool(x[untouched].isnan().all()) for x in whole)


def steps(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: dict, unit_offset: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Queries and keys after norm and RoPE, in PyTorch."""
    turned = []
    for x, name in ((q, "q_norm"), (k, "k_norm")):
        x = x.to(dtype)
        if weights:
            x = rope_reference.rms_norm(x, weights[name].to(dtype), weights["eps"], unit_offset)
        turned.append(rope_reference.rotate(x, cos.to(dtype), sin.to(dtype)))
    return turned


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "rotary", "tokens"),
    [
        (4, 2, 16, None, 1),
        (5, 1, 64, None, 3),
        (7, 7, 80, 32, 5),
        (8, 1, 128, None, 2),
        (14, 2, 96, 24, 2),
        (16, 4, 256, 64, 1),
    ],
)
def test_shapes(dtype, norm, heads, groups, dim, rotary, tokens):
    check(tokens, heads=heads, groups=groups, dim=dim, rotary=rotary, dtype=dtype, norm=norm)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"heads_first": True}, {"skipped": 3}, {"unit_offset": True, "norm": True}]
)
def test_options(options):
    check(9, page=32, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [0, 63, 300])
def test_many_tokens(tokens):
    check(tokens, dim=32, page=64)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rotary dims"):
        check(2, dim=64, rotary=72)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 32, "groups": 8, "dim": 128},
        {"heads": 7, "groups": 1, "dim": 80, "rotary": 32, "page": 64, "norm": True, "dtype": FP16},
        {"heads": 16, "groups": 4, "dim": 256, "page": 256, "norm": True, "unit_offset": True, "dtype": FP32},
    ],
)
def test_sweep(options):
    for tokens in (1, 2, 5, 63, 256, 300, 1000, 5000):
        check(tokens, fused=tokens % 2 == 0, heads_first=tokens % 3 == 0, skipped=tokens // 7, device="cuda", **options)


@pytest.mark.gpu
def test_pages_beyond_what_32_bits_count():
    # 2^31 elements in front of the pages in use.
    check(63, heads=32, groups=8, dim=128, spare=2**31 // (16 * 8 * 128), device="cuda")
