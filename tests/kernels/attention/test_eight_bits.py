"""Keys and values of 8 bits in the kernels, against exact attention over what is stored, whatever the format's error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.attention import decode, paged, rope_reference, widened_pages
from hf_fastattn.kernels.attention.append import rope_append
from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.prefill import paged_prefill
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.reference import paged_attention as reference_attention
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.page_formats import KV_DTYPES, dequantised, page_bytes, page_scales, page_views, raw_pages
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, assert_attention, assert_close, in_eight_bits, make_batch
from tests.tools.combinations import in_turn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = list(KV_DTYPES)
# (query heads a kv head, head dim, page)
SHAPES = [(4, 128, 16), (1, 64, 4), (8, 80, 16), (2, 256, 32), (3, 16, 8)]


def attend(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Split-KV attention, cut into parts."""
    room = Workspace(batch.q.device)
    if set(batch.counts) != {1}:
        options |= {"cu_seqlens_q": batch.cu_seqlens_q, "max_query_len": max(batch.counts)}
    return paged_decode(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, scale=batch.scale, workspace=room, **options
    )


@pytest.fixture(params=[0, 4], ids=["by a list", "few rows"])
def most_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are decoded without a work list; batches here have few."""
    monkeypatch.setattr(decode, "MOST_ROWS_OF_8_BITS", request.param)


def prefill(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pages = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
    return paged_prefill(*pages, scale=batch.scale, **options)


def batch_of(kv_dtype: str, counts: list[int], pasts: list[int], **options: Any) -> Batch:
    return in_eight_bits(make_batch(counts, pasts, scattered=True, **options), kv_dtype)


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), in_turn(SHAPES, [BF16, FP16, FP32]))
def test_decode(kv_dtype, shape, dtype):
    options = dict(zip(("ratio", "dim", "page"), shape, strict=True))
    batch = batch_of(kv_dtype, [1, 1, 1, 1], [0, 63, 127, 300], dtype=dtype, **options)
    assert_attention(batch, attend(batch))
    # Rows that are all whole tiles, and a row without a key.
    batch = batch_of(kv_dtype, [1, 1], [255, -1], dtype=dtype, **options)
    assert_attention(batch, attend(batch))


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("window", [None, 70])
def test_one_row(kv_dtype, window):
    for past in (0, 200):
        batch = batch_of(kv_dtype, [1], [past], dtype=BF16, dim=64, ratio=4, page=16, window=window)
        assert_attention(batch, attend(batch, window=window), window=window)


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("counts", [[3, 1], [9, 20]])
def test_appends_and_prompts(kv_dtype, dtype, counts):
    batch = batch_of(kv_dtype, counts, [140, 0], dtype=dtype, dim=64, ratio=4, page=16)
    assert_attention(batch, attend(batch))
    assert_attention(batch, prefill(batch))


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
@pytest.mark.parametrize("window", [1, 50])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window_and_softcap(window, softcap):
    options = {"page": 16, "ratio": 4, "dim": 128, "dtype": BF16, "window": window}
    for counts, pasts, run in (([1, 1], [3, 200], attend), ([5, 9], [130, 0], prefill)):
        batch = batch_of("fp8", counts, pasts, **options)
        assert_attention(batch, run(batch, window=window, softcap=softcap), window=window, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("rows", [3, 20])
def test_shared_prefixes(kv_dtype, rows):
    batch = make_batch([1] * rows, [64 + 3 * row for row in range(rows)], page=16, ratio=2, dim=64, dtype=BF16, shared=4)
    batch = in_eight_bits(batch, kv_dtype)
    starts, lens = torch.tensor([0, rows]).int(), torch.tensor([64]).int()
    got = paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts, lens,
        max_group_rows=rows, scale=batch.scale, workspace=Workspace(batch.q.device), hopper=True,
    )  # fmt: skip
    assert_attention(batch, got)


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("magnitude", [2.0**-30, 2.0**-10, 2.0**12])
def test_magnitudes_that_fp16_does_not_hold_with_weights(dtype, magnitude):
    """Values of one row differ that much, and weights are multiplied with their scales."""
    batch = make_batch([1, 1], [70, 200], page=16, ratio=4, dim=128, dtype=FP32)
    for row, (_, values) in enumerate(batch.rows):
        position = torch.arange(batch.lengths[row])
        values *= torch.where(position % 3 == 0, 1.0, magnitude)[:, None, None]
        batch.v_pages[torch.tensor(batch.table[row])[position // 16], position % 16] = values
    batch = in_eight_bits(dataclasses.replace(batch, q=batch.q.to(dtype)), "fp8")
    assert_attention(batch, attend(batch))


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**40])
def test_queries_that_fp16_does_not_hold(magnitude):
    """Scores are ordinary ones: keys are as small as queries are large."""
    batch = make_batch([1, 1], [40, 130], page=16, ratio=4, dim=128, dtype=BF16)
    for row, (keys, _) in enumerate(batch.rows):
        keys /= magnitude
        position = torch.arange(batch.lengths[row])
        batch.k_pages[torch.tensor(batch.table[row])[position // 16], position % 16] = keys
    batch = in_eight_bits(dataclasses.replace(batch, q=batch.q * magnitude), "fp8")
    assert_attention(batch, attend(batch))


@pytest.mark.usefixtures("most_rows")
@pytest.mark.interpreter
def test_what_is_not_finite_reaches_only_who_sees_it():
    batch = batch_of("int8", [1, 1], [40, 40], page=16, ratio=2, dim=64, dtype=BF16)
    page_scales(batch.k_pages)[batch.table[1][0], 0, 3, 1] = math.nan
    out, _ = attend(batch)
    assert out[1, :2].isnan().all() and out[0].isfinite().all() and out[1, 2:].isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_batch_invariance(kv_dtype):
    batch = batch_of(kv_dtype, [1, 1, 1], [1100, 20, 300], page=16, ratio=4, dim=64, dtype=BF16)
    together = attend(batch, batch_invariant=True)[0]
    for row in range(3):
        alone = paged_decode(
            batch.q[row : row + 1], batch.k_pages, batch.v_pages, batch.page_table[row : row + 1],
            batch.seq_lens[row : row + 1], scale=batch.scale, workspace=Workspace(batch.q.device), batch_invariant=True,
        )[0]  # fmt: skip
        assert torch.equal(alone[0], together[row])


def turned(x: Any, h: Any, idx: Any) -> Any:
    return torch.cat((-x[32:], x[:32])) * (1 + 0.01 * idx)


def lowered(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score - 0.1 * (q_idx - kv_idx)


def two_of_three(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx % 3 != 1) | (kv_idx == q_idx)


VARIANTS = {
    "score": Variant(score_mod=lowered),
    "mask": Variant(mask_mod=two_of_three),
    "key transform": Variant(query_transform=turned, key_transform=turned),
    "sigmoid": Variant(score_mod=lowered, normalizer="sigmoid"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("counts", [[1, 1], [20, 9]])
def test_variants(name, counts):
    batch = batch_of("fp8", counts, [70, 40], page=16, ratio=4, dim=64, dtype=FP32)
    variant = VARIANTS[name]
    compiled = compile_variant(variant, batch.q.shape[-1], batch.q.device)
    got = (attend if counts[0] == 1 else prefill)(batch, variant=compiled)
    plan = ReadPlan([[page for page in row if page >= 0] for row in batch.table], batch.counts, batch.lengths, 16)
    wide = dequantised(batch.k_pages, batch.v_pages, torch.float64, len(batch.k_pages))
    want, _ = variant_attention(batch.q.double(), *wide, plan, variant, scale=batch.scale)
    narrow = dequantised(batch.k_pages, batch.v_pages, FP32, len(batch.k_pages))
    plain, _ = variant_attention(batch.q, *narrow, plan, variant, scale=batch.scale)
    assert_close("output", got[0], plain, want)
    # The reference dequantises by itself.
    assert torch.equal(variant_attention(batch.q, batch.k_pages, batch.v_pages, plan, variant, scale=batch.scale)[0], plain)


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("counts", [[1, 1, 1], [7, 1, 30]])
def test_reference(kv_dtype, counts):
    batch = batch_of(kv_dtype, counts, [40, 0, 65], page=8, ratio=2, dim=32, dtype=FP32)
    plan = ReadPlan([[page for page in row if page >= 0] for row in batch.table], batch.counts, batch.lengths, 8)
    assert_attention(batch, reference_attention(batch.q, batch.k_pages, batch.v_pages, plan, scale=batch.scale))


def appended(launch: Any, kv_dtype: str, dtype: torch.dtype, dim: int, rotary: int, norm: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(9, heads, dim, generator=generator).to(dtype) for heads in (6, 3, 3))
    k[2], v[4] = 0.0, 0.0
    v[5] *= 1000
    cos, sin = torch.randn(2, 9, rotary, generator=generator).to(dtype)
    weight = torch.rand(dim, generator=generator).to(dtype) + 0.5 if norm else None
    raw = torch.full((4, page_bytes(8, 3, dim)), 255, dtype=torch.uint8)
    pages = page_views(raw, 8, 3, dim, KV_DTYPES[kv_dtype])
    slots = torch.tensor([3, 0, 31, 9, 19, 18, 4, 16, 17])
    out = launch(q, k, v, cos, sin, *pages, slots, q_norm=weight, k_norm=weight)
    return out, raw


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("dim", "rotary", "norm"), [(16, 16, False), (32, 16, True), (80, 0, False), (128, 128, True)])
def test_append_writes_the_bytes_of_the_reference(kv_dtype, dim, rotary, norm):
    out, raw = appended(rope_append, kv_dtype, FP32, dim, rotary, norm)
    want, expected = appended(rope_reference.rope_append, kv_dtype, FP32, dim, rotary, norm)
    torch.testing.assert_close(out, want)
    different = raw.int() - expected.int()
    # Norms and rotations may differ in their last bit, which now and then rounds to the next number; no other byte does.
    assert (different != 0).float().mean() < 1e-3
    assert torch.equal((raw != 255).any(1), (expected != 255).any(1))


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_append_of_what_is_not_finite(kv_dtype):
    raw = torch.zeros(1, page_bytes(8, 2, 16), dtype=torch.uint8)
    pages = page_views(raw, 8, 2, 16, KV_DTYPES[kv_dtype])
    q, cos = torch.ones(3, 2, 16), torch.ones(3, 16)
    k, v = torch.ones(3, 2, 16), torch.ones(3, 2, 16)
    k[0, 1, 3], v[1, 0, 0], v[2, 1, 5] = math.nan, math.inf, -math.inf
    rope_append(q, k, v, cos, 0 * cos, *pages, torch.tensor([0, 1, 2]))
    keys, values = dequantised(*pages, FP32, 1)
    bad = [(0, 0, 1), (1, 1, 0), (1, 2, 1)]
    for which, token, head in bad:
        assert (keys, values)[which][0, token, head].isnan().all()
    assert sum(int(x[0, :3].isnan().any(-1).sum()) for x in (keys, values)) == len(bad)


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_widened_pages(kv_dtype):
    batch = batch_of(kv_dtype, [40, 9], [30, 0], page=16, ratio=2, dim=48, dtype=BF16)
    pages = widened_pages.widened_pages(batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, BF16)
    for row, stored in enumerate(batch.rows):
        position = torch.arange(batch.lengths[row])
        for held, own in zip(pages[:2], stored, strict=True):
            assert torch.equal(held[pages[2][row, position // 16].long(), position % 16], own.to(BF16))


@pytest.mark.interpreter
def test_prompts_read_a_copy_in_16_bits(monkeypatch):
    """The Gluon kernel by a stand-in, since the interpreter does not run it."""
    from hf_fastattn.kernels.attention import hopper_prefill

    seen = []

    def stand_in(q, k_pages, v_pages, *rest, processors, work_lists, **options):
        seen.append(k_pages.dtype)
        return paged_prefill(q, k_pages, v_pages, *rest, **options)

    def triton_prefill(q, k_pages, *rest, **options):
        seen.append(k_pages.dtype)
        return paged_prefill(q, k_pages, *rest, **options)

    monkeypatch.setattr(hopper_prefill, "hopper_prefill", stand_in)
    monkeypatch.setattr(paged, "paged_prefill", triton_prefill)
    monkeypatch.setattr(widened_pages, "WIDENED_TOKENS", 8)
    batch = batch_of("fp8", [40, 30], [10, 0], page=16, ratio=4, dim=64, dtype=BF16)
    pages = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
    room = Workspace(batch.q.device)
    options: dict[str, Any] = {"max_query_len": 40, "scale": batch.scale, "workspace": room, "hopper": True}
    assert_attention(batch, paged.paged_attention(*pages, **options))
    assert_attention(batch, paged.paged_attention(*pages, **{**options, "hopper": False}))
    assert seen == [BF16, BF16]
    # Not where a row's result may not depend on the others, nor where the copy would be too large.
    assert_attention(batch, paged.paged_attention(*pages, **options, batch_invariant=True))
    monkeypatch.setattr(widened_pages, "MOST_BYTES", 1000)
    assert_attention(batch, paged.paged_attention(*pages, **options))
    assert seen[2:] == [torch.float8_e4m3fn] * 2


@pytest.mark.interpreter
def test_a_scale_that_is_off_is_noticed():
    """The criterion of these tests sees one head's scales x 1.1."""
    batch = batch_of("fp8", [1, 1], [70, 90], page=16, ratio=2, dim=64, dtype=BF16)
    before = raw_pages(batch.k_pages).clone()
    for which in (0, 1):
        page_scales(batch.k_pages)[:, 1, :, which] *= 1.1
        with pytest.raises(AssertionError, match="error"):
            assert_attention(batch, attend(batch))
        raw_pages(batch.k_pages).copy_(before)
    assert_attention(batch, attend(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("ratio", "dim", "dtype"), [(4, 128, BF16), (7, 64, FP16)])
def test_on_a_gpu(kv_dtype, ratio, dim, dtype):
    options = {"ratio": ratio, "dim": dim, "page": 16, "groups": 8, "dtype": dtype, "device": "cuda"}
    # Rows that are cut into parts, one row, a short append, a prompt that the Gluon kernel takes over a copy, and one not.
    for counts, pasts in (([1] * 20, [300 * row for row in range(20)]), ([1], [5000]), ([5, 16], [900, 3])):
        batch = batch_of(kv_dtype, counts, pasts, **options)
        assert_attention(batch, attend(batch))
    batch = batch_of(kv_dtype, [700, 300], [500, 0], **options)
    pages = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
    assert_attention(batch, prefill(batch))
    # What the copy in the dtype of q holds.
    copied = dataclasses.replace(batch, rows=[(k.to(dtype).float(), v.to(dtype).float()) for k, v in batch.rows])
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for gluon in {False, hopper}:
        assert_attention(copied, paged.paged_attention(*pages, max_query_len=700, scale=batch.scale, hopper=gluon))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("rows", [8, 70])
def test_shared_prefixes_on_a_gpu(kv_dtype, rows):
    pasts = [640 + 7 * row for row in range(rows)]
    batch = make_batch([1] * rows, pasts, page=16, ratio=4, dim=128, groups=8, dtype=BF16, shared=40, device="cuda")
    batch = in_eight_bits(batch, kv_dtype)
    starts, lens = torch.tensor([0, rows]).int().cuda(), torch.tensor([640]).int().cuda()
    got = paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts, lens,
        max_group_rows=rows, scale=batch.scale, hopper=True,
    )  # fmt: skip
    assert_attention(batch, got)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_append_on_a_gpu(kv_dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(300, heads, 128, generator=generator, device="cuda").bfloat16() for heads in (32, 8, 8))
    cos, sin = torch.randn(2, 300, 128, generator=generator, device="cuda").bfloat16()
    slots, written = torch.randperm(320, generator=generator, device="cuda")[:300], []
    for launch in (rope_append, rope_reference.rope_append):
        raw = torch.full((20, page_bytes(16, 8, 128)), 255, dtype=torch.uint8, device="cuda")
        pages = page_views(raw, 16, 8, 128, KV_DTYPES[kv_dtype])
        launch(q, k, v, cos, sin, *pages, slots)
        written.append([x.flatten(0, 1)[slots] for x in dequantised(*pages, FP32, 20)])
    # Values are not rotated: byte for byte the same.
    assert torch.equal(written[0][1], written[1][1])
    # Keys are rounded once here, and to bf16 before in the reference: no further from the exact ones than its.
    exact = rope_reference.rotate(k.double(), cos.double(), sin.double())
    errors = [(keys.double() - exact).square().mean().sqrt() for keys, _ in written]
    assert 0 < errors[0] <= 1.01 * errors[1] < 0.05 * exact.square().mean().sqrt()
