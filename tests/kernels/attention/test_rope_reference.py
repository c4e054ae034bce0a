"""RoPE and append against Transformers' own functions, bit for bit in fp32."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hf_fastattn.kernels.attention.rope_reference import rope_append, signed_sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_append(dtype, norm):
    tokens, heads, groups, dim = 7, 4, 2, 16
    q, k, v = (torch.randn(tokens, n, dim).to(dtype) for n in (heads, groups, groups))
    angles = torch.randn(tokens, dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages = [torch.full((5, 4, groups, dim), math.nan, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([3, 17, 4, 5, 19, 0, 8])
    weight = torch.rand(dim).to(dtype) if norm else None
    got = rope_append(q, k, v, cos, signed_sin(sin), *pages, slots, q_norm=weight, k_norm=weight, eps=1e-5)
    if norm:
        module = LlamaRMSNorm(dim, eps=1e-5)
        module.weight.data = weight
        q, k = module(q).detach(), module(k).detach()
    want_q, want_k = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    assert torch.equal(got, want_q[0].transpose(0, 1))
    assert torch.equal(pages[0].flatten(0, 1)[slots], want_k[0].transpose(0, 1))
    assert torch.equal(pages[1].flatten(0, 1)[slots], v)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[slots] = False
    assert bool(pages[0].flatten(0, 1)[untouched].isnan().all())


def test_partial_rotary_leaves_the_rest():
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    angles = torch.randn(3, 2).repeat(1, 2)
    pages = [torch.zeros(1, 4, 1, 16) for _ in range(2)]
    got = rope_append(q, k, k, angles.cos(), signed_sin(angles.sin()), *pages, torch.arange(3))
    assert torch.equal(got[..., 4:], q[..., 4:])
    want, _ = apply_rotary_pos_emb(q[None, ..., :4], k[None, ..., :4], angles.cos()[None], angles.sin()[None], 2)
    assert torch.equal(got[..., :4], want[0])
