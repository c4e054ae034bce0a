"""RoPE inside attention: keys lie in the cache unrotated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.rotation import MOST_POSITIONS, RotaryFrequencies, Rotation
from hf_fastattn.kernels.variants.variant import Variant, rotation_of
from tests.kernels.cases import Batch, dense_attention, make_batch
from tests.kernels.variants import test_kernels
from tests.kernels.variants.mods import MODS
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


# ---- by frequencies, which the kernels know -------------------------------------------------------------------


def frequencies(width: int) -> torch.Tensor:
    return torch.exp2(-torch.arange(width // 2) / 2.0)


def by_frequencies(width: int, factor: float = 1.0) -> Variant:
    return Variant(rope="inside").with_frequencies(frequencies(width), factor)


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("kind", BATCHES)
def test_frequencies_equal_rotation_before_the_cache(kind, width):
    batch = make_batch(*BATCHES[kind], page=16, ratio=4, groups=2, dim=DIM, scattered=True)
    variant = by_frequencies(width)
    out, _ = variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant, scale=batch.scale)
    want, _ = dense_attention(rotated_outside(batch, width, False), torch.float32)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_any_position_is_as_exact_as_the_first():
    rotation = RotaryFrequencies.of(frequencies(16), 1.5)
    x, position = torch.randn(7, 20), torch.tensor([0, 255, 256, 4095, 70_001, 524_287, MOST_POSITIONS - 1])
    angles = position[:, None].double() * frequencies(16).double()
    turned = torch.complex(*x[:, :16].double().chunk(2, -1)) * torch.polar(torch.full_like(angles, 1.5), angles)
    want = torch.cat((turned.real, turned.imag, x[:, 16:].double()), -1)
    torch.testing.assert_close(rotation(x, torch.tensor(0), position).double(), want, atol=1e-6, rtol=1e-5)


# Head dimension, rotated of it, dtype: whole heads, parts, and sizes that are no powers of 2.
SHAPES = {
    "whole": (16, 16, torch.float32),
    "D = 64, bf16": (64, 64, torch.bfloat16),
    "D = 128": (128, 128, torch.float32),
    "D = 48, a part": (48, 32, torch.float32),
    "D = 80, bf16": (80, 80, torch.bfloat16),
    "a quarter, bf16": (32, 8, torch.bfloat16),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", test_kernels.BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_frequencies_in_kernels(kind, shape):
    dim, width, dtype = SHAPES[shape]
    variant = by_frequencies(width, 1.3)
    assert compile_variant(variant, dim, torch.device("cpu")).hooks.rotated == width
    test_kernels.check(variant, kind, dim=dim, dtype=dtype, groups=2)


def in_runs(width: int, run: int, device: str = "cpu") -> Variant:
    return Variant(rope="inside").rotated_by(RotaryFrequencies.of(frequencies(width).to(device), 1.3, run))


# No shorter than a tile of keys, and shorter.
@pytest.mark.interpreter
@pytest.mark.parametrize("run", [128, 4])
@pytest.mark.parametrize("kind", test_kernels.BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_rotated_in_runs(kind, shape, run):
    dim, width, dtype = SHAPES[shape]
    test_kernels.check(in_runs(width, run), kind, dim=dim, dtype=dtype, groups=2)


@pytest.mark.parametrize("run", [1, 4, 128])
def test_places_in_runs_and_where_runs_begin_are_positions(run):
    rotation, whole = RotaryFrequencies.of(frequencies(16), 1.5, run), RotaryFrequencies.of(frequencies(16), 1.5)
    x, position = torch.randn(6, 16), torch.tensor([0, 3, 127, 128, 300, 70_001])
    cos, sin = rotation.places(position)
    before = x * cos + torch.cat((x[:, 8:], x[:, :8]), 1) * sin
    torch.testing.assert_close(rotation(before, torch.tensor(0), position), whole(x, torch.tensor(0), position))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", test_kernels.BATCHES)
def test_with_other_functions(kind):
    variant = dataclasses.replace(by_frequencies(16), score_mod=MODS["relative bias table"].score, softcap=3.0)
    test_kernels.check(variant, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [128, 1])
@pytest.mark.parametrize("kind", test_kernels.BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_frequencies_in_compiled_kernels(kind, shape, run):
    dim, width, dtype = SHAPES[shape]
    test_kernels.check(in_runs(width, run, "cuda"), kind, dim=dim, dtype=dtype, groups=2, device="cuda")


def test_kernels_see_one_rotation_only():
    assert rotation_of(by_frequencies(16)) is not None
    own = Variant(rope="inside", query_transform=lambda q, h, q_idx: q).with_frequencies(frequencies(16))
    assert rotation_of(own) is None and isinstance(own.key_transform, RotaryFrequencies)
    with pytest.raises(ValueError, match="rope='model'"):
        Variant().with_frequencies(frequencies(16))
