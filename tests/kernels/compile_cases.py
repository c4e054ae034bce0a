"""Which launches are compiled for which GPUs, and what the result may take. A new kernel or variant is a new line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_fastattn.kernels.layer.configs import ProductTile
from hf_fastattn.kernels.sampling.fork import MOST_BEAMS
from hf_fastattn.kernels.sampling.loop_tensors import MOST_ROWS
from tests.kernels.compile_launches import (
    BF16,
    FP16,
    FP32,
    activation,
    adapted,
    add_norm,
    advanced,
    angles,
    append,
    at_once,
    chosen,
    continued,
    decode,
    delta,
    delta_prompt,
    dilated,
    experts_of,
    few,
    forked,
    gated,
    hopper,
    inside,
    logprobs,
    merge,
    paged_peer,
    prefill,
    processed,
    product,
    pushed,
    quantised,
    rope,
    routed,
    shared_prefix,
    short,
    slid,
    summed,
    tiles,
    typical,
    varied,
    weights_summed,
    widened,
)
from tests.tools.targets import TARGETS

# ptxas spills a few bytes outside the loops now and then; that costs nothing.
SPILLED_BYTES = 32


@dataclass(frozen=True)
class Case:
    """One launch.

    Args:
        launch: calls a launcher on CPU tensors.
        kernels: names of the kernels that it launches.
        programs: how many of their programs have to fit on a multiprocessor at once.
        exact: fp32 products may not be one product in TF32; three are as exact as fp32.
        targets: names in `TARGETS`; a kernel for one architecture only can abort the compiler on others.
        overlapped: asynchronous products may not be made to wait for each other.
        spilled: bytes a thread that may spill.
    """

    launch: Callable[[], object]
    kernels: tuple[str, ...]
    programs: int
    exact: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    overlapped: bool = False
    spilled: int = SPILLED_BYTES


# GPUs of capability 8.0 do not convert e4m3.
FP8 = ("sm_90", "sm_100")
SHARED_PREFIX = ("prefixes_kernel", "suffix_kernel")

# Their producer and consumers take all registers and nearly all shared memory of a multiprocessor.
HOPPER: dict[str, Any] = {
    "kernels": ("work_list_kernel", "hopper_prefill_kernel"),
    "programs": 1,
    "targets": ("sm_90",),
    "overlapped": True,
}
LISTED: dict[str, Any] = {**HOPPER, "kernels": ("visited_kernel", *HOPPER["kernels"])}
PREFIXES: dict[str, Any] = {
    **HOPPER,
    "kernels": ("prefix_items_kernel", "hopper_prefill_kernel", "suffix_kernel"),
}

SAMPLED = ("scan_logits_kernel", "draw_kernel")
DELTA = ("delta_conv_kernel", "conv_tail_kernel", "delta_chunk_kernel", "delta_scan_kernel", "gated_norm_kernel")
CONTINUED = ("best_of_chunk_kernel", "score_kernel")
GREEDY = ("greedy_chunk_kernel", "best_of_chunks_kernel")

ONE = ("router_kernel", "one_gate_up_kernel", "one_down_kernel")
ONE_SHORT = ("router_kernel", "one_gate_up_kernel", "one_down_at_once_kernel")
SEVERAL = ("router_kernel", "several_gate_up_kernel", "several_down_kernel")
MANY = ("choice_kernel", "sort_pairs_kernel", "grouped_kernel", "combine_kernel")
HOPPER_MANY = {**HOPPER, "kernels": ("choice_kernel", "sort_rows_kernel", "hopper_grouped_kernel", "combine_kernel")}
HOPPER_WIDE = {**HOPPER, "kernels": ("choice_kernel", "sort_rows_kernel", "hopper_wide_kernel", "combine_kernel")}

# Rows of q, k and v in Llama-3-8B.
QKV = (4096, 1024, 1024)
# The same in Llama-3.2-1B, and its gate and up.
SMALL_QKV, MLP = (2048, 512, 512), (8192, 8192)
SPLIT = ProductTile(64, 128, warps=4, stages=4, split=4)

ROW_KERNELS = {
    "nf4": "codes_matrix_kernel", "fp4 flat": "codes_matrix_kernel", "tiled": "tiles_matrix_kernel",
    "ints": "ints_row_kernel",
}  # fmt: skip

CASES = {
    "append, one token": Case(lambda: append(32, 8, 128), ("rope_append_kernel",), programs=8),
    "append, qk-norm": Case(lambda: append(32, 8, 128, tokens=512, norm=True), ("rope_append_kernel",), programs=4),
    "append, partial rotary": Case(lambda: append(4, 4, 80, rotary=32, norm=True), ("rope_append_kernel",), programs=8),
    "rope tables": Case(lambda: angles(64), ("rope_tables_kernel",), programs=8),
    "rope tables, 40 pairs, fp32": Case(lambda: angles(40, FP32), ("rope_tables_kernel",), programs=8),
    "decode": Case(lambda: decode(4, 128), ("split_kv_kernel",), programs=2),
    "decode of 16 tokens, fp32": Case(
        lambda: decode(4, 128, FP32, tokens=16), ("split_kv_kernel",), programs=1, exact=True, spilled=64
    ),
    "decode, fp32": Case(lambda: decode(4, 128, FP32), ("split_kv_kernel",), programs=1, exact=True),
    "decode, D = 80": Case(lambda: decode(1, 80, FP16), ("split_kv_kernel",), programs=2),
    "decode, D = 256": Case(lambda: decode(8, 256, softcap=50.0), ("split_kv_kernel",), programs=2),
    "decode, window": Case(lambda: decode(7, 64, page=64, window=128), ("split_kv_kernel",), programs=2),
    "decode, 8 tokens": Case(lambda: decode(8, 128, tokens=8), ("split_kv_kernel",), programs=1),
    "decode, many rows": Case(lambda: decode(4, 128, rows=256), ("split_kv_kernel",), programs=2),
    "decode, 12 tokens of a row": Case(
        lambda: decode(4, 128, rows=1, tokens=12, processors=132), ("split_kv_kernel",), programs=1
    ),
    "decode, 8 tokens of a row, D = 256": Case(
        lambda: decode(8, 256, rows=1, tokens=8, processors=132), ("split_kv_kernel",), programs=1
    ),
    "decode, few rows": Case(lambda: decode(4, 128, rows=4, processors=132), ("split_kv_kernel",), programs=1),
    "decode, 16 rows": Case(lambda: decode(4, 128, rows=16, processors=132), ("split_kv_kernel",), programs=1),
    "decode, 16 rows, window": Case(
        lambda: decode(8, 64, rows=16, processors=132, window=100), ("split_kv_kernel",), programs=3, targets=("sm_90",)
    ),
    "decode, 48 rows": Case(
        lambda: decode(4, 128, rows=48, processors=132), ("split_kv_kernel",), programs=3, targets=("sm_90",)
    ),
    "decode, 256 rows": Case(
        lambda: decode(4, 128, rows=256, processors=132), ("split_kv_kernel",), programs=4, targets=("sm_90",)
    ),
    "decode, 256 rows, window": Case(
        lambda: decode(8, 64, rows=256, processors=132, window=100), ("split_kv_kernel",), programs=4, targets=("sm_90",)
    ),
    "decode, one row, appends": Case(
        lambda: decode(4, 128, rows=1, appends=True, norm=True), ("decode_row_kernel",), programs=1
    ),
    "decode, one row, D = 80, window, appends": Case(
        lambda: decode(7, 80, FP16, rows=1, appends=True, rotary=32, window=100), ("decode_row_kernel",), programs=1
    ),
    "decode, one row, D = 256, appends": Case(
        lambda: decode(8, 256, rows=1, appends=True, norm=True), ("decode_row_kernel",), programs=1
    ),
    "decode, one row": Case(lambda: decode(4, 128, rows=1), ("decode_row_kernel",), programs=1),
    "decode, one row, D = 80": Case(lambda: decode(7, 80, FP16, rows=1, window=128), ("decode_row_kernel",), programs=1),
    "decode, one row, D = 256": Case(lambda: decode(8, 256, rows=1, softcap=50.0), ("decode_row_kernel",), programs=1),
    "short row": Case(lambda: short(2, 128, norm=True), ("short_row_kernel",), programs=2),
    "short rows": Case(lambda: short(4, 128, norm=True, rows=4), ("short_row_kernel",), programs=2),
    "short row, D = 64": Case(lambda: short(4, 64), ("short_row_kernel",), programs=2),
    "short row, D = 80, window": Case(
        lambda: short(7, 80, FP16, rotary=32, norm=True, window=100), ("short_row_kernel",), programs=2
    ),
    "append, fp8": Case(
        lambda: append(32, 8, 128, norm=True, kv_dtype="fp8"), ("rope_append_kernel",), programs=4, targets=FP8
    ),
    "append, int8, partial rotary": Case(
        lambda: append(4, 4, 80, rotary=32, kv_dtype="int8"), ("rope_append_kernel",), programs=4
    ),
    "decode, fp8": Case(
        lambda: decode(4, 128, rows=64, processors=132, kv_dtype="fp8"), ("split_kv_kernel",), programs=2, targets=FP8
    ),
    "decode, int8": Case(
        lambda: decode(4, 128, rows=64, processors=132, kv_dtype="int8"), ("split_kv_kernel",), programs=1, spilled=64
    ),
    "decode, D = 64, fp8": Case(
        lambda: decode(7, 64, FP16, rows=64, window=128, processors=132, kv_dtype="fp8"),
        ("split_kv_kernel",),
        programs=1,
        spilled=64,
        targets=FP8,
    ),
    "decode, 16 tokens, fp8": Case(
        lambda: decode(4, 128, tokens=16, kv_dtype="fp8"),
        ("split_kv_kernel",),
        programs=1,
        # Quicker than tiles of 16 rows, which do not spill.
        spilled=128,
        targets=FP8,
    ),
    "decode, one row, fp8": Case(
        lambda: decode(4, 128, rows=1, processors=132, kv_dtype="fp8"), ("decode_row_kernel",), programs=2, targets=FP8
    ),
    "decode, one row, int8": Case(
        lambda: decode(7, 80, FP16, rows=1, processors=132, kv_dtype="int8", window=128), ("decode_row_kernel",), programs=1
    ),
    "decode, 3 rows, fp8": Case(
        lambda: decode(4, 128, rows=3, processors=132, kv_dtype="fp8"), ("decode_row_kernel",), programs=2, targets=FP8
    ),
    "decode, 6 rows, fp8": Case(
        lambda: decode(4, 128, rows=6, processors=132, kv_dtype="fp8"), ("split_kv_kernel",), programs=1, targets=FP8
    ),
    "shared prefix, fp8": Case(
        lambda: shared_prefix(4, 128, rows=16, kv_dtype="fp8"),
        SHARED_PREFIX,
        programs=1,
        spilled=64,
        targets=FP8,
    ),
    "shared prefix, int8": Case(
        lambda: shared_prefix(4, 128, rows=16, kv_dtype="int8"), SHARED_PREFIX, programs=1, spilled=64
    ),
    "prefill, fp8": Case(lambda: prefill(4, 128, kv_dtype="fp8"), ("prefill_kernel",), programs=1, targets=FP8),
    "prefill, int8": Case(lambda: prefill(4, 128, kv_dtype="int8"), ("prefill_kernel",), programs=1, spilled=64),
    "widened pages, fp8": Case(lambda: widened("fp8"), ("widen_pages_kernel",), programs=2, targets=FP8),
    "widened pages, int8": Case(lambda: widened("int8"), ("widen_pages_kernel",), programs=2),
    "shared prefix": Case(lambda: shared_prefix(4, 128, rows=256, most=256), SHARED_PREFIX, programs=1),
    "shared prefix, 4 rows": Case(lambda: shared_prefix(4, 128, rows=4, most=4), SHARED_PREFIX, programs=1),
    "shared prefix, 16 rows": Case(lambda: shared_prefix(4, 128, rows=16), SHARED_PREFIX, programs=1),
    "shared prefix, 64 rows": Case(lambda: shared_prefix(4, 128, most=64), SHARED_PREFIX, programs=1),
    "shared prefix, groups of 4": Case(
        lambda: shared_prefix(4, 128, rows=256, groups=64, most=4), SHARED_PREFIX, programs=2
    ),
    "shared prefix, many groups": Case(
        lambda: shared_prefix(4, 128, rows=256, groups=64, most=8), SHARED_PREFIX, programs=2
    ),
    "shared prefix, two levels": Case(
        lambda: shared_prefix(4, 128, groups=16, most=64, levels=2), SHARED_PREFIX, programs=1
    ),
    "shared prefix, three levels, few rows": Case(
        lambda: shared_prefix(4, 128, groups=16, most=8, levels=3, rows=16), SHARED_PREFIX, programs=1
    ),
    "shared prefix, three levels, many rows": Case(
        lambda: shared_prefix(4, 128, groups=64, most=64, levels=3, rows=256), SHARED_PREFIX, programs=1
    ),
    "shared prefix, R = 1": Case(lambda: shared_prefix(1, 64, FP16, most=100), SHARED_PREFIX, programs=1),
    # Elsewhere what lies around the loops spills.
    "shared prefix, R = 7": Case(lambda: shared_prefix(7, 128, most=64), SHARED_PREFIX, programs=1, targets=("sm_90",)),
    "shared prefix, D = 96": Case(
        lambda: shared_prefix(7, 96, FP16, page=64, softcap=50.0), SHARED_PREFIX, programs=1, targets=("sm_90",)
    ),
    "shared prefix, D = 256": Case(lambda: shared_prefix(8, 256, rows=16), SHARED_PREFIX, programs=1),
    # Triton 3.6: 36 bytes, outside of the loop over keys.
    "shared prefix, fp32": Case(
        lambda: shared_prefix(4, 128, FP32, rows=16), SHARED_PREFIX, programs=1, exact=True, spilled=48
    ),
    "prefill": Case(lambda: prefill(4, 128), ("prefill_kernel",), programs=1),
    "prefill, short": Case(lambda: prefill(4, 128, tokens=16), ("prefill_kernel",), programs=2),
    # Measured: smaller tiles spill nothing, and take half again as long.
    "prefill, fp32": Case(lambda: prefill(4, 128, FP32), ("prefill_kernel",), programs=1, exact=True, spilled=208),
    "prefill, D = 96": Case(lambda: prefill(1, 96, FP16, window=128), ("prefill_kernel",), programs=1),
    "prefill, D = 256": Case(lambda: prefill(8, 256, softcap=50.0), ("prefill_kernel",), programs=1),
    "prefill, window": Case(lambda: prefill(7, 64, page=64, window=128), ("prefill_kernel",), programs=1),
    "decode, variant": Case(
        lambda: decode(4, 128, variant=varied(score_mod="relative_bias_table", mask_mod="document")),
        ("split_kv_kernel",),
        programs=2,
    ),
    "decode, 40 rows, D = 64": Case(
        lambda: decode(4, 64, rows=40, processors=132), ("split_kv_kernel",), programs=3, targets=("sm_90",)
    ),
    # Keys are held in fp32 while they are transformed, which takes all registers.
    "decode, variant, transforms": Case(
        lambda: decode(4, 128, variant=varied(query_transform=rope, key_transform=rope, output_transform=rope)),
        ("split_kv_kernel",),
        programs=1,
        spilled=256,
    ),
    "shared prefix, variant": Case(
        lambda: shared_prefix(4, 128, most=64, variant=varied(softcap=30.0, sinks=torch.zeros(32), score_mod="alibi")),
        SHARED_PREFIX,
        programs=1,
    ),
    # Angles of a tile stay in registers.
    "decode, RoPE inside, keys not rotated": Case(
        lambda: decode(4, 128, rows=64, processors=132, variant=inside(run=1)), ("split_kv_kernel",), programs=2
    ),
    "decode, RoPE inside": Case(
        lambda: decode(4, 128, rows=64, processors=132, variant=inside()), ("split_kv_kernel",), programs=2
    ),
    "decode, RoPE inside, one row": Case(
        lambda: decode(4, 128, rows=1, processors=132, variant=inside()), ("split_kv_kernel",), programs=2
    ),
    "decode, RoPE inside of a part, D = 96": Case(
        lambda: decode(7, 96, FP16, page=64, variant=inside(96, 64)), ("split_kv_kernel",), programs=1, spilled=128
    ),
    "decode, RoPE inside, fp32": Case(
        lambda: decode(4, 64, FP32, variant=inside(64)), ("split_kv_kernel",), programs=1, exact=True, spilled=64
    ),
    "append, RoPE inside": Case(
        lambda: decode(4, 128, tokens=8, processors=132, variant=inside()), ("split_kv_kernel",), programs=1, spilled=64
    ),
    "prefill, RoPE inside": Case(
        lambda: prefill(4, 128, variant=inside()), ("prefill_kernel",), programs=1, targets=("sm_80", "sm_90")
    ),
    "prefill, RoPE inside, short": Case(
        lambda: prefill(4, 128, tokens=16, variant=inside()), ("prefill_kernel",), programs=1, spilled=160
    ),
    "shared prefix, RoPE inside by frequencies": Case(
        lambda: shared_prefix(4, 128, most=64, variant=inside()),
        SHARED_PREFIX,
        programs=1,
        spilled=128,
        targets=("sm_90",),
    ),
    "shared prefix, RoPE inside": Case(
        lambda: shared_prefix(4, 128, rows=256, most=256, variant=varied(query_transform=rope, key_transform=rope)),
        SHARED_PREFIX,
        programs=1,
        spilled=128,
        targets=("sm_90",),
    ),
    "prefill, variant": Case(
        lambda: prefill(4, 128, variant=varied(score_mod="relative_bias_table", mask_mod="sinks_and_window")),
        ("prefill_kernel",),
        programs=1,
    ),
    "prefill, variant, softcap": Case(
        lambda: prefill(4, 128, variant=varied(softcap=30.0)), ("prefill_kernel",), programs=1
    ),
    "prefill, variant, prefix-LM": Case(
        lambda: prefill(4, 128, variant=varied(mask_mod="prefix_lm", causal=False)), ("prefill_kernel",), programs=1
    ),
    "prefill, variant, transforms": Case(
        lambda: prefill(4, 128, variant=varied(query_transform=rope, key_transform=rope)),
        ("prefill_kernel",),
        programs=1,
        spilled=64,
    ),
    "prefill, variant, sigmoid": Case(
        lambda: prefill(4, 128, FP16, variant=varied(normalizer="sigmoid")), ("prefill_kernel",), programs=1
    ),
    "prefill, variant, listed": Case(
        lambda: prefill(4, 128, listed=True, variant=varied(mask_mod="document")),
        ("visited_kernel", "prefill_kernel"),
        programs=1,
    ),
    "decode, variant, listed": Case(
        lambda: decode(4, 128, listed=True, variant=varied(mask_mod="block_sparse")),
        ("visited_kernel", "split_kv_kernel"),
        programs=2,
    ),
    "decode, 8 bits, variant, listed": Case(
        lambda: decode(4, 128, listed=True, kv_dtype="int8", variant=varied(mask_mod="block_sparse")),
        ("visited_kernel", "split_kv_kernel"),
        programs=2,
    ),
    "hopper prefill": Case(lambda: hopper(4, 128), **HOPPER),
    "hopper prefill, R = 7": Case(lambda: hopper(7, 64, page=64), **HOPPER),
    "hopper prefill, D = 256": Case(lambda: hopper(1, 256, page=128), **HOPPER),
    "hopper prefill, D = 256, R = 8": Case(lambda: hopper(8, 256, page=64), **HOPPER),
    "hopper prefill, page 256": Case(lambda: hopper(4, 128, page=256), **HOPPER),
    "hopper prefill, softcap": Case(lambda: hopper(4, 128, variant=varied(softcap=30.0)), **HOPPER),
    "hopper prefill, alibi and sinks": Case(
        lambda: hopper(4, 128, variant=varied(alibi=torch.zeros(32), sinks=torch.zeros(32))), **HOPPER, spilled=128
    ),
    "hopper prefill, bias table": Case(
        lambda: hopper(4, 128, variant=varied(score_mod="relative_bias_table")), **HOPPER, spilled=64
    ),
    "hopper prefill, bias table, R = 7, D = 64": Case(
        lambda: hopper(7, 64, page=64, variant=varied(score_mod="relative_bias_table")), **HOPPER
    ),
    "hopper prefill, distance buckets, R = 16, D = 256": Case(
        lambda: hopper(16, 256, page=64, variant=varied(score_mod="distance_buckets")), **HOPPER, spilled=256
    ),
    "hopper prefill, sigmoid": Case(lambda: hopper(4, 128, variant=varied(normalizer="sigmoid")), **HOPPER),
    "hopper prefill, window, R = 7, D = 64": Case(
        lambda: hopper(7, 64, page=64, listed=True, variant=varied(window=100)), **LISTED
    ),
    "hopper prefill, window": Case(lambda: hopper(4, 128, listed=True, variant=varied(window=100)), **LISTED),
    "hopper prefill, documents": Case(
        lambda: hopper(4, 128, listed=True, variant=varied(mask_mod="document")), **LISTED, spilled=176
    ),
    "hopper prefill, dilated window": Case(lambda: hopper(4, 128, listed=True, variant=dilated()), **LISTED),
    "hopper prefill, block-sparse, D = 256": Case(
        lambda: hopper(8, 256, page=64, listed=True, variant=varied(mask_mod="block_sparse", causal=False)),
        **LISTED,
        spilled=64,
    ),
    "shared prefix, Gluon": Case(lambda: shared_prefix(4, 128, columns=2048, most=64, hopper=True), **PREFIXES),
    "shared prefix, Gluon, three levels": Case(
        lambda: shared_prefix(1, 128, columns=2048, most=128, hopper=True, levels=3, page=256), **PREFIXES
    ),
    "shared prefix, Gluon, D = 256": Case(
        lambda: shared_prefix(8, 256, columns=2048, most=16, hopper=True, page=64), **PREFIXES
    ),
    "work list": Case(lambda: tiles(64), ("work_list_kernel",), programs=2),
    "merge": Case(lambda: merge(128, BF16), ("merge_states_kernel",), programs=4),
    "merge, fp32": Case(lambda: merge(256, FP32), ("merge_states_kernel",), programs=4),
    "delta rule": Case(delta, ("delta_step_kernel",), programs=2),
    "delta rule, 64 rows": Case(lambda: delta(tokens=64), ("delta_step_kernel",), programs=2),
    "delta rule, states move": Case(lambda: delta(tokens=8, moves=True), ("delta_step_kernel",), programs=2),
    "delta rule, fp32": Case(lambda: delta(dtype=FP32), ("delta_step_kernel",), programs=2),
    "delta rule, prompt": Case(delta_prompt, DELTA, programs=1, spilled=2048),
    "delta rule, prompt that goes on": Case(lambda: delta_prompt(goes_on=True), DELTA, programs=1, spilled=2048),
    "delta rule, prompt in fp32": Case(lambda: delta_prompt(dtype=FP32), DELTA, programs=1, spilled=2048),
    "add, norm": Case(lambda: add_norm(4096), ("rms_norm_kernel",), programs=1),
    "add, norm, 16 tokens": Case(lambda: add_norm(4096, tokens=16), ("rms_norm_kernel",), programs=1),
    "add, norm, 16384": Case(lambda: add_norm(16384, FP32), ("rms_norm_kernel",), programs=1),
    "add, norm of two parts": Case(lambda: add_norm(8192, tokens=16, parts=2), ("rms_norm_kernel",), programs=1),
    "sum over ranks, norm": Case(lambda: summed(4096), ("summed_norm_kernel",), programs=1),
    "sum over 8 ranks, norm": Case(
        lambda: summed(8192, tokens=16, ranks=8), ("summed_norm_kernel",), programs=1, spilled=96
    ),
    "sum over four ranks, norm": Case(lambda: summed(8192, ranks=4), ("summed_norm_kernel",), programs=1),
    "sum over ranks, norm, fp32": Case(lambda: summed(16384, FP32), ("summed_norm_kernel",), programs=1, spilled=48),
    "sum over ranks, pushed": Case(lambda: pushed(4096), ("pushed_norm_kernel",), programs=1),
    "sum over 8 ranks, pushed": Case(lambda: pushed(8192, tokens=16, ranks=8), ("pushed_norm_kernel",), programs=1),
    "sum over four ranks, pushed": Case(lambda: pushed(8192, ranks=4), ("pushed_norm_kernel",), programs=1),
    "sum over ranks, pushed, fp32": Case(lambda: pushed(8192, FP32), ("pushed_norm_kernel",), programs=1),
    "activation": Case(activation, ("silu_and_mul_kernel",), programs=8),
    "weights summed": Case(weights_summed, ("weight_sum_kernel",), programs=4),
    "product": Case(lambda: product(1, 4096, QKV), ("matvec_kernel",), programs=3),
    "product, K = 11008": Case(lambda: product(1, 11008, (4096,), residual=True), ("matvec_kernel",), programs=3),
    "product, K = 7168": Case(lambda: product(1, 7168, (4096,)), ("matvec_kernel",), programs=1),
    "product at once": Case(lambda: at_once(1024, (2048, 1024, 1024), norm=True), ("one_wave_kernel",), programs=3),
    "product at once, gate and up": Case(
        lambda: at_once(1024, (3072, 3072), norm=True, gated=True), ("one_wave_kernel",), programs=2
    ),
    "product at once, K = 3072": Case(
        lambda: at_once(3072, (1024,), FP16, residual=True, bias=True), ("one_wave_kernel",), programs=4
    ),
    "products of few tokens": Case(lambda: few(4, 2560, QKV, norm=True), ("few_rows_kernel",), programs=3),
    "products of few tokens, of 16": Case(lambda: few(16, 2560, QKV, norm=True), ("few_rows_kernel",), programs=3),
    "products of few tokens, one weight": Case(
        lambda: few(4, 14336, (4096,), residual=True), ("few_rows_kernel",), programs=2
    ),
    "products of few tokens, one weight, of 16": Case(
        lambda: few(16, 4096, (2560,), FP16, residual=True, bias=True), ("few_rows_kernel",), programs=2
    ),
    "products of few tokens, gate and up": Case(
        lambda: few(4, 2560, (9728, 9728), norm=True, gated=True), ("few_rows_kernel",), programs=2
    ),
    "products of few tokens, gate and up, of 16": Case(
        lambda: few(16, 2560, (9728, 9728), FP16, gated=True), ("few_rows_kernel",), programs=2
    ),
    "products of few tokens, small gate and up": Case(
        lambda: few(16, 2048, MLP, norm=True, gated=True), ("few_rows_kernel",), programs=4, targets=("sm_80", "sm_90")
    ),
    "product, bias": Case(lambda: product(1, 896, (896, 128, 128), FP16, bias=True), ("matvec_kernel",), programs=3),
    "product, fp32": Case(lambda: product(1, 4096, QKV, FP32), ("matvec_kernel",), programs=3),
    "product, lm head": Case(lambda: product(1, 4096, (128256,)), ("matvec_kernel",), programs=2),
    "product, gate and up": Case(lambda: gated(1, 4096, 14336), ("matvec_kernel",), programs=3),
    "product, 16 tokens": Case(lambda: product(16, 4096, QKV, bias=True), ("skinny_kernel",), programs=2),
    "product, 64 tokens": Case(lambda: product(64, 4096, QKV), ("skinny_kernel",), programs=2),
    "product, 8 tokens, K = 1000": Case(lambda: product(8, 1000, (999,), residual=True), ("skinny_kernel",), programs=1),
    "product, 16 tokens, fp32": Case(
        lambda: product(16, 4096, QKV, FP32, residual=False), ("skinny_kernel",), programs=2, exact=True
    ),
    "product, 64 tokens, fp32": Case(
        lambda: product(64, 4096, QKV, FP32, residual=False), ("skinny_kernel",), programs=2, exact=True, spilled=64
    ),
    "product, 64 tokens, fp32, gate and up": Case(
        lambda: gated(64, 4096, 14336, FP32), ("skinny_kernel",), programs=2, exact=True, spilled=288
    ),
    "product, 16 tokens, split": Case(
        lambda: product(16, 14336, (4096,), residual=True, tile=SPLIT), ("skinny_kernel",), programs=1
    ),
    "product, 16 tokens, gate and up": Case(lambda: gated(16, 4096, 14336), ("skinny_kernel",), programs=1),
    "product, 32 tokens, gate and up": Case(
        lambda: gated(32, 4096, 14336), ("skinny_kernel",), programs=2, targets=("sm_90",)
    ),
    "product, 64 tokens, gate and up": Case(lambda: gated(64, 4096, 14336), ("skinny_kernel",), programs=1),
    "product of autocast": Case(
        lambda: product(1, 4096, (4096,), weight_dtype=FP32, residual=True), ("matvec_kernel",), programs=3
    ),
    "product of autocast, gate and up": Case(
        lambda: gated(1, 4096, 14336, weight_dtype=FP32), ("matvec_kernel",), programs=3
    ),
    "product of autocast, 16 tokens": Case(
        lambda: product(16, 4096, (4096,), weight_dtype=FP32, residual=True), ("skinny_kernel",), programs=1
    ),
    "product of autocast, 64 tokens": Case(
        lambda: product(64, 4096, QKV, weight_dtype=FP32), ("skinny_kernel",), programs=1
    ),
    "product of autocast, 64 tokens, gate and up": Case(
        lambda: gated(64, 4096, 14336, weight_dtype=FP32), ("skinny_kernel",), programs=1
    ),
    "add, norm of autocast": Case(lambda: add_norm(4096, tokens=16, stream=FP32), ("rms_norm_kernel",), programs=1),
    **{
        f"{kind}{what}": Case(functools.partial(quantised, kind, 1, k, counts, gated="gate" in what), (kernel,), programs=2)
        for kind, kernel in ROW_KERNELS.items()
        for what, k, counts in (("", 4096, SMALL_QKV), (", down", 14336, (512,)), (", gate and up", 4096, (512, 512)))
    },
    **{
        f"{kind}, {tokens} tokens{what}": Case(
            functools.partial(quantised, kind, tokens, k, counts, gated="gate" in what), (kernel,), programs=1
        )
        for kind, kernel in (("nf4", "codes_matrix_kernel"), ("tiled", "tiles_matrix_kernel"))
        for tokens in (8, 16)
        for what, k, counts in (("", 4096, SMALL_QKV), (", gate and up", 4096, (512, 512)))
    },
    "nf4, 16 tokens, small": Case(lambda: quantised("nf4", 16, 896, (896,)), ("codes_matrix_kernel",), programs=2),
    "fp4, 16 tokens": Case(lambda: quantised("fp4 flat", 16, 14336, (512,), FP16), ("codes_matrix_kernel",), programs=2),
    "nf4, fp32": Case(lambda: quantised("nf4", 1, 4096, SMALL_QKV, FP32), ("codes_row_kernel",), programs=1, exact=True),
    "lora": Case(lambda: adapted(1, 2048, SMALL_QKV, (16, 16, 16)), ("matvec_kernel",), programs=3),
    "lora, down": Case(lambda: adapted(1, 8192, (2048,), (16,)), ("matvec_kernel",), programs=3),
    "lora, gate and up": Case(lambda: adapted(1, 2048, MLP, (16, 16), gated=True), ("matvec_kernel",), programs=3),
    "lora, r = 128": Case(lambda: adapted(1, 2048, SMALL_QKV, (128, 0, 128)), ("matvec_kernel",), programs=2),
    "lora, 8 tokens": Case(lambda: adapted(8, 2048, SMALL_QKV, (16, 16, 16)), ("skinny_kernel",), programs=2),
    "lora, 8 tokens, q and v, fp16": Case(
        lambda: adapted(8, 2048, SMALL_QKV, (16, 0, 8), FP16, FP16), ("skinny_kernel",), programs=2
    ),
    "lora, 8 tokens, down": Case(lambda: adapted(8, 8192, (2048,), (16,)), ("skinny_kernel",), programs=1),
    "lora, 8 tokens, gate and up": Case(lambda: adapted(8, 2048, MLP, (16, 16), gated=True), ("skinny_kernel",), programs=1),
    "lora, 8 tokens, split": Case(
        lambda: adapted(8, 14336, (4096,), (64,), BF16, BF16, tile=SPLIT), ("skinny_kernel",), programs=1
    ),
    # On sm_80 what lies around the loops spills.
    "lora, 8 tokens, fp32": Case(
        lambda: adapted(8, 2048, SMALL_QKV, (16, 16, 16), FP32),
        ("skinny_kernel",),
        programs=2,
        exact=True,
        targets=("sm_90", "sm_100"),
    ),
    "lora, 8 tokens, r = 128": Case(lambda: adapted(8, 2048, SMALL_QKV, (128, 128, 128)), ("skinny_kernel",), programs=1),
    "lora, 64 tokens": Case(lambda: adapted(64, 2048, SMALL_QKV, (16, 16, 16)), ("skinny_kernel",), programs=1),
    "lora, 64 tokens, r = 128": Case(lambda: adapted(64, 2048, SMALL_QKV, (128, 128, 128)), ("skinny_kernel",), programs=1),
    "lora, 64 tokens, gate and up, r = 64": Case(
        lambda: adapted(64, 2048, MLP, (64, 64), gated=True), ("skinny_kernel",), programs=1
    ),
    "lora, stacked": Case(lambda: adapted(1, 2048, SMALL_QKV, (32, 0, 32), stacked=True), ("matvec_kernel",), programs=3),
    "lora, stacked, 8 tokens": Case(
        lambda: adapted(8, 2048, SMALL_QKV, (32, 48, 0), stacked=True), ("skinny_kernel",), programs=1
    ),
    "lora, stacked, 8 tokens, gate and up": Case(
        lambda: adapted(8, 2048, MLP, (128, 128), gated=True, stacked=True), ("skinny_kernel",), programs=1
    ),
    "lora, stacked, 64 tokens, down": Case(
        lambda: adapted(64, 8192, (2048,), (32,), BF16, BF16, stacked=True), ("skinny_kernel",), programs=1
    ),
    "router": Case(lambda: routed(1, 2048, 128, 8), ("router_kernel",), programs=4),
    "router, 16 tokens": Case(lambda: routed(16, 2048, 128, 8), ("router_kernel",), programs=2),
    "router, 512 experts": Case(lambda: routed(16, 2048, 512, 10, shared=True), ("router_kernel",), programs=1),
    "router, many tokens": Case(lambda: routed(64, 2048, 128, 8), ("choice_kernel",), programs=2),
    "experts": Case(lambda: experts_of(1, 2048, 768, 128, 8), ONE_SHORT, programs=2, targets=("sm_90", "sm_100")),
    "experts, K = 10, I = 500": Case(
        lambda: experts_of(1, 2040, 500, 12, 10, FP16, shared=True), ONE_SHORT, programs=2, targets=("sm_90", "sm_100")
    ),
    "experts, K = 16": Case(lambda: experts_of(1, 2048, 768, 128, 16), ONE, programs=2),
    "experts, I = 14336": Case(lambda: experts_of(1, 4096, 14336, 8, 2), ONE, programs=2),
    "experts, one token, fp32": Case(lambda: experts_of(1, 2048, 768, 128, 8, FP32), ONE, programs=2),
    "experts in four parts": Case(
        lambda: experts_of(1, 2048, 192, 128, 8), ONE_SHORT, programs=2, targets=("sm_90", "sm_100")
    ),
    "experts in four parts, 4 tokens": Case(lambda: experts_of(4, 2048, 192, 128, 8), SEVERAL, programs=1),
    "experts, 4 tokens": Case(lambda: experts_of(4, 2048, 768, 128, 8), SEVERAL, programs=1),
    "experts, 16 tokens": Case(lambda: experts_of(16, 2048, 768, 128, 8), SEVERAL, programs=1),
    "experts, 16 tokens, fp32": Case(lambda: experts_of(16, 2048, 768, 128, 8, FP32), SEVERAL, programs=1, exact=True),
    "experts, 8 tokens, shared, I = 1000": Case(
        lambda: experts_of(8, 2040, 1000, 60, 4, FP16, shared=True), SEVERAL, programs=1
    ),
    "experts, 24 tokens": Case(lambda: experts_of(24, 2048, 768, 8, 8), MANY, programs=1),
    "experts, 24 tokens, few an expert": Case(lambda: experts_of(24, 2048, 768, 128, 2), MANY, programs=2),
    "experts, 66 tokens, few an expert": Case(lambda: experts_of(66, 2048, 768, 128, 2, kept=11), MANY, programs=1),
    "experts, 66 tokens, several an expert": Case(lambda: experts_of(66, 2048, 768, 128, 2, kept=6), MANY, programs=1),
    "experts, 300 tokens, several an expert": Case(lambda: experts_of(300, 2048, 768, 128, 2, kept=16), MANY, programs=2),
    "experts, 512 tokens": Case(lambda: experts_of(512, 2048, 768, 8, 8), MANY, programs=1),
    "experts, 64 tokens, fp32": Case(lambda: experts_of(64, 512, 768, 8, 8, FP32), MANY, programs=1, exact=True),
    "experts, 100 tokens, shared, I = 1000": Case(
        lambda: experts_of(100, 2040, 1000, 8, 4, FP16, shared=True), MANY, programs=1
    ),
    "experts, 512 tokens, Hopper": Case(lambda: experts_of(512, 2048, 768, 8, 8, hopper=True), **HOPPER_MANY),
    "experts, 128 tokens, Hopper": Case(lambda: experts_of(128, 2048, 768, 8, 8, hopper=True), **HOPPER_WIDE),
    "experts, 512 tokens, Hopper, shared, I = 1000": Case(
        lambda: experts_of(512, 2040, 1000, 8, 4, FP16, shared=True, hopper=True), **HOPPER_MANY
    ),
    "sample": Case(chosen, SAMPLED, programs=1),
    "sample, fp16, V = 32003": Case(lambda: chosen(FP16, vocab=32003), SAMPLED, programs=1),
    "sample, fp32, V = 262144": Case(lambda: chosen(FP32, vocab=262144), SAMPLED, programs=1),
    "sample, each row its own": Case(lambda: chosen(by_row=True), SAMPLED, programs=1),
    "log-probabilities": Case(logprobs, ("token_logprobs_kernel",), programs=2),
    "log-probabilities of a draw, fp32, V = 32003": Case(
        lambda: logprobs(FP32, vocab=32003, drawn=True), ("token_logprobs_kernel",), programs=2
    ),
    # The benchmark's peer: many programs, since nothing but their number hides the latency of memory.
    "page by page": Case(lambda: paged_peer(1, 128), ("page_by_page_kernel",), programs=2),
    "page by page, R = 4": Case(lambda: paged_peer(4, 128), ("page_by_page_kernel",), programs=2),
    "greedy": Case(lambda: chosen(greedy=True), GREEDY, programs=6),
    "greedy, fp32": Case(lambda: chosen(FP32, greedy=True), GREEDY, programs=6),
    "repetition penalty": Case(processed, ("process_logits_kernel",), programs=6),
    "no end of sequence": Case(lambda: processed(penalty=False), ("suppress_eos_kernel",), programs=16),
    "typical": Case(typical, ("typical_kernel",), programs=1),
    "typical, V = 32003": Case(lambda: typical(32003), ("typical_kernel",), programs=1),
    "advance": Case(advanced, ("advance_kernel",), programs=1),
    "slide": Case(slid, ("slide_kernel",), programs=2),
    "slide, long rows": Case(lambda: slid(1, columns=4096, pages=4096), ("slide_kernel",), programs=1),
    "advance, one row": Case(lambda: advanced(1), ("advance_kernel",), programs=1),
    "advance, windows, tokens seen": Case(lambda: advanced(windows=2, seen=True), ("advance_kernel",), programs=1),
    "continuations": Case(lambda: continued(152064, BF16), CONTINUED, programs=1),
    "continuations, fp32, V = 32003": Case(lambda: continued(32003, FP32), CONTINUED, programs=1),
    "fork": Case(forked, ("fork_tables_kernel", "copy_pages_kernel"), programs=4),
    "fork, most beams, windows": Case(
        lambda: forked(MOST_BEAMS, windows=2), ("fork_tables_kernel", "copy_pages_kernel"), programs=1
    ),
    "advance, most rows": Case(
        lambda: advanced(MOST_ROWS, columns=16, windows=2, seen=True), ("advance_kernel",), programs=1
    ),
}
