"""RoPE inside attention: keys lie in the cache unrotated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants.rotation import Rotation
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, dense_attention, make_batch
from tests.kernels.variants import test_kernels
from tests.kernels.variants.test_reference import plan_of

LENGTH, DIM = 256, 16
BATCHES = {"decode": ([1, 1], [70, 20]), "append": ([5, 1], [30, 41]), "prefill": ([20, 9], [0, 20])}


def tables(width: int, pairs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(LENGTH)[:, None] * torch.exp2(-torch.arange(width // 2) / 2.0)
    angles = angles.repeat_interleave(2, 1) if pairs else angles.repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, first: int, width: int, pairs: bool) -> torch.Tensor:
    """`x: [S, heads, D]` at positions from `first` on, as complex numbers."""
    angles = torch.arange(first, first + len(x))[:, None, None] * torch.exp2(-torch.arange(width // 2) / 2.0)
    own = x[..., :width]
    a, b = (own[..., ::2], own[..., 1::2]) if pairs else own.chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    parts = [turned.real, turned.imag]
    result = torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1)
    return torch.cat((result, x[..., width:]), -1)


def rotated_outside(batch: Batch, width: int, pairs: bool) -> Batch:
    queries = zip(batch.q.split(batch.counts), batch.lengths, strict=True)
    q = torch.cat([rotated(part, length - len(part), width, pairs) for part, length in queries])
    return dataclasses.replace(batch, q=q, rows=[(rotated(k, 0, width, pairs), v) for k, v in batch.rows])


@pytest.mark.parametrize("pairs", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("kind", BATCHES)
def test_equals_rotation_before_the_cache(kind, width, pairs):
    batch = make_batch(*BATCHES[kind], page=16, ratio=4, groups=2, dim=DIM, scattered=True)
    variant = Variant(rope="inside").with_rotation(*tables(width, pairs), pairs=pairs)
    out, _ = variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant, scale=batch.scale)
    want, _ = dense_attention(rotated_outside(batch, width, pairs), torch.float32)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("pairs", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("kind", BATCHES)
def test_in_kernels(kind, pairs):
    variant = Variant(rope="inside").with_rotation(*tables(8 if pairs else 16, pairs), pairs=pairs)
    test_kernels.check(variant, kind)


def test_own_transforms_stay():
    cos, sin = tables(16)
    variant = Variant(rope="inside", query_transform=lambda q, h, q_idx: q).with_rotation(cos, sin)
    assert not isinstance(variant.query_transform, Rotation) and isinstance(variant.key_transform, Rotation)


def test_who_rotates_has_to_be_said():
    cos, sin = tables(16)
    with pytest.raises(ValueError, match="with_rotation"):
        Variant(rope="inside").functions()
    with pytest.raises(ValueError, match="rope='model'"):
        Variant().with_rotation(cos, sin)
    with pytest.raises(ValueError, match="even width"):
        Rotation(cos[:, :5], sin[:, :5])
