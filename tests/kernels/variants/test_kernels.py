"""The Triton kernels with translated variants against the reference, in decode, append, prefill and shared prefixes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.prefill import paged_prefill
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.attention.visited import list_tiles
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, assert_close, make_batch
from tests.kernels.variants import mods
from tests.kernels.variants.mods import HEADS, LENGTH, MODS
from tests.kernels.variants.test_reference import plan_of
from tests.tools.combinations import in_turn

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# New tokens and earlier ones of each row.
BATCHES = {
    "decode": ([1], [70]),
    "append": ([5, 1], [30, 41]),
    "prefill": ([20, 9], [0, 20]),
    "shared prefix": ([1, 1], [60, 50]),
}


def launch(batch: Batch, kind: str, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    compiled = compile_variant(variant, batch.q.shape[-1], batch.q.device)
    room = Workspace(batch.q.device)
    # So that items are cut and merged.
    room.processors = 1
    pages = (batch.q, batch.k_pages, batch.v_pages, batch.page_table)
    if kind == "prefill":
        return paged_prefill(*pages, batch.cu_seqlens_q, batch.seq_lens, scale=batch.scale, variant=compiled)
    if kind == "shared prefix":
        starts, lens = torch.tensor([0, len(batch.table)]).int(), torch.tensor([32]).int()
        return paged_decode_shared(
            *pages, batch.seq_lens, starts.to(batch.q.device), lens.to(batch.q.device),
            max_group_rows=len(batch.table), scale=batch.scale, workspace=room, variant=compiled,
        )  # fmt: skip
    options = {} if kind == "decode" else {"cu_seqlens_q": batch.cu_seqlens_q, "max_query_len": max(batch.counts)}
    return paged_decode(*pages, batch.seq_lens, scale=batch.scale, workspace=room, variant=compiled, **options)


def double(variant: Variant, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    wide = (x.to(FP64) for x in (batch.q, batch.k_pages, batch.v_pages))
    return variant_attention(*wide, plan_of(batch), variant, scale=batch.scale)


def check(variant: Variant, kind: str, *, ratio: int = 4, dtype: torch.dtype = FP32, **options: Any) -> None:
    counts, pasts = BATCHES[kind]
    shared = 2 if kind == "shared prefix" else 0
    options = {"page": 16, "ratio": ratio, "groups": 1, "dim": 16, "dtype": dtype, "scattered": True, **options}
    batch = make_batch(counts, pasts, shared=shared, **options)
    out, lse = launch(batch, kind, variant)
    want, want_lse = double(variant, batch)
    plain, plain_lse = variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant, scale=batch.scale)
    assert out.dtype == dtype
    if dtype == FP32:
        torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse, want_lse, atol=2e-4, rtol=1e-5)
    else:
        assert_close("output", out, plain, want)
        # Transformed vectors are rounded.
        error, allowed = ((found - want_lse).abs().max() for found in (lse, plain_lse))
        assert error <= max(2 * allowed, 1e-2)


# Each in two of the kernels, which call the same translation.
IN_TWO = [pair for kinds in (list(BATCHES), list(BATCHES)[1:] + list(BATCHES)[:1]) for pair in in_turn(list(MODS), kinds)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "kind"), IN_TWO)
def test_flex_attentions_functions(name, kind):
    mod = MODS[name]
    variant = Variant(score_mod=mod.score, mask_mod=mod.mask, causal=mod.causal)
    check(variant, kind, ratio=(1, 4, 7)[sum(map(len, (name, kind))) % 3])


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_heads(ratio, kind):
    variant = Variant(score_mod=MODS["relative bias table"].score, mask_mod=MODS["block-sparse"].mask)
    check(variant, kind, ratio=ratio, groups=2, dtype=BF16)


def half_turn(q, h, q_idx):
    """RoPE with a table of its own, as Llama's."""
    half = q.shape[-1] // 2
    return q * COS[q_idx] + torch.cat((-q[half:], q[:half])) * SIN[q_idx]


def turned_pairs(k, h, kv_idx):
    """RoPE of neighbouring pairs, as GPT-J's."""
    pairs = torch.stack((-k[1::2], k[::2]), -1).flatten()
    return k * COS[kv_idx] + pairs * SIN[kv_idx]


def normalised(o, h, q_idx):
    return o * torch.rsqrt((o * o).mean() + 1e-5) * (1.0 + SCALES[h])


ANGLES = torch.arange(LENGTH)[:, None] * torch.exp2(-torch.arange(8) / 2.0).repeat(2)
COS, SIN = ANGLES.cos(), ANGLES.sin()
SCALES = torch.linspace(-0.5, 0.5, HEADS * 16).view(HEADS, 16)
FEATURES = {
    "transforms": Variant(query_transform=half_turn, key_transform=half_turn, output_transform=normalised),
    "pairs": Variant(query_transform=turned_pairs, key_transform=turned_pairs),
    "sigmoid": Variant(normalizer="sigmoid", score_mod=lambda score, b, h, q_idx, kv_idx: score - 2.0),
    "sigmoid, plain scores": Variant(normalizer="sigmoid"),
    "sinks": Variant(sinks=torch.linspace(-2, 3, 4), mask_mod=MODS["dilated"].mask),
    "softcap and alibi": Variant(softcap=3.0, alibi=torch.linspace(0.01, 0.5, HEADS)),
    "window": Variant(window=20, score_mod=MODS["alibi"].score),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, kind):
    if name == "window" and kind == "shared prefix":
        pytest.skip("windows have no shared prefixes")
    check(FEATURES[name], kind)


@pytest.fixture
def tables_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions read has to be where attention runs."""
    for module in (mods, sys.modules[__name__]):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                monkeypatch.setattr(module, name, value.cuda())


@pytest.mark.gpu
@pytest.mark.usefixtures("tables_on_the_gpu")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", MODS)
def test_compiled_functions(name, kind, dtype):
    mod = MODS[name]
    variant = Variant(score_mod=mod.score, mask_mod=mod.mask, causal=mod.causal)
    check(variant, kind, ratio=7, dtype=dtype, groups=4, dim=128, device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("tables_on_the_gpu")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", FEATURES)
def test_compiled_features(name, kind):
    if name == "window" and kind == "shared prefix":
        pytest.skip("windows have no shared prefixes")
    held = {field: value.cuda() for field, value in vars(FEATURES[name]).items() if isinstance(value, torch.Tensor)}
    check(dataclasses.replace(FEATURES[name], **held), kind, dtype=BF16, device="cuda")


# New tokens and earlier ones: more than a tile of queries, less, and past keys.
HOPPER_ROWS = ([200, 9, 60], [0, 20, 131])
ON_HOPPER = [
    ("plain", 4, 128), ("relative bias table", 4, 128), ("softcap, then alibi", 4, 128), ("document", 4, 128),
    ("prefix-LM", 4, 128), ("block-sparse", 4, 128), ("sinks and window", 4, 128), ("alibi in documents", 7, 128),
    ("block-sparse", 7, 128), ("sinks", 4, 128), ("sigmoid", 4, 128), ("softcap and alibi", 4, 128), ("window", 4, 128),
    ("softcap", 4, 128), ("distance buckets", 4, 128), ("relative bias table", 7, 128), ("relative bias table", 14, 128),
    ("distance buckets", 1, 128), ("dilated window", 4, 128), ("dilated window", 7, 64), ("sinks and window", 4, 256),
    ("window", 1, 256),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("tables_on_the_gpu")
@pytest.mark.parametrize(("name", "ratio", "dim"), ON_HOPPER)
def test_on_hopper(name, ratio, dim):
    """The Gluon kernel; of 7 heads none are packed. What is in no window any more was released."""
    from hf_fastattn.kernels.attention import hopper_prefill

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    mod = MODS.get(name)
    features = {**FEATURES, "plain": Variant(), "dilated window": built_in.dilated(3, 30)}
    variant = Variant(score_mod=mod.score, mask_mod=mod.mask, causal=mod.causal) if mod else features[name]
    held = {field: value.cuda() for field, value in vars(variant).items() if isinstance(value, torch.Tensor)}
    if "sinks" in held:
        held["sinks"] = held["sinks"].repeat(28 // len(held["sinks"]))
    variant = dataclasses.replace(variant, **held)
    batch = make_batch(
        *HOPPER_ROWS, page=16, ratio=ratio, groups=28 // ratio, dim=dim, dtype=BF16, scattered=True, device="cuda",
        window=variant.window,
    )  # fmt: skip
    compiled = compile_variant(variant, dim, batch.q.device)
    packed = hopper_prefill.packed_heads(ratio, compiled)
    visited = list_tiles(
        compiled, batch.cu_seqlens_q, batch.seq_lens, tokens=len(batch.q), heads=(28, 28 // packed),
        most_keys=batch.page_table.shape[1] * 16, block_m=128, block_n=hopper_prefill.TILES[dim][0],
    )  # fmt: skip
    hides = variant.window is not None or variant.mask_mod is not None or not variant.causal
    for listed in (visited,) if hides else (visited, None):
        out, lse = hopper_prefill.hopper_prefill(
            batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.cu_seqlens_q, batch.seq_lens,
            scale=batch.scale, processors=132, variant=compiled, visited=listed,
        )  # fmt: skip
        plan = dataclasses.replace(plan_of(batch), window=variant.window)
        inputs = (batch.q, batch.k_pages, batch.v_pages)
        want, want_lse = variant_attention(*(x.to(FP64) for x in inputs), plan, variant, scale=batch.scale)
        plain, _ = variant_attention(*inputs, plan, variant, scale=batch.scale)
        assert_close("output", out, plain, want)
        torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-5)
