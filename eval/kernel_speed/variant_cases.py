"""The variants of the attention benchmark, what of plain attention each has to visit, and the check before every figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn.eval.kernel_speed.attention_cases import DIM, GROUPS, HEADS, Inputs, Shape
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.rotation import RotaryFrequencies
from hf_fastattn.kernels.variants.variant import Variant

# A tile of the prefill kernels: tokens and keys.
TILE_TOKENS, TILE_KEYS = 32, 64
# Queries whose masks are computed at a time.
QUERIES = 1024
LONG = 32768
Made = Callable[[torch.device], Variant]


@dataclass(frozen=True)
class Case:
    """One line: a variant on a shape. `flex`: whether FlexAttention computes it too."""

    name: str
    shape: Shape
    make: Made
    flex: bool = False


def alibi(device: torch.device) -> Variant:
    """Slopes of all heads."""
    return built_in.alibi(built_in.alibi_slopes(HEADS, device))


def bias_table(device: torch.device) -> Variant:
    """A learned bias of each head and distance: one look-up a score."""
    table = torch.randn(HEADS, LONG, generator=torch.Generator().manual_seed(2)).to(device)
    return Variant(score_mod=lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx])


def documents(tokens: int) -> Made:
    """Documents of equal length."""
    return lambda device: built_in.documents(torch.arange(LONG, device=device).int() // tokens)


def half_of_blocks(device: torch.device) -> Variant:
    """Of the blocks of 128 keys the own one and a random half of the others."""
    count = LONG // 128
    blocks = torch.rand(count, count, generator=torch.Generator().manual_seed(3)) < 0.5
    return built_in.block_sparse((blocks | torch.eye(count, dtype=torch.bool)).to(device), 128)


def rope_inside(device: torch.device) -> Variant:
    """Keys and queries come rotated to their places in runs, as `patch` has them, and are turned by those of the runs."""
    frequencies = 10_000.0 ** -(torch.arange(0, DIM, 2, device=device) / DIM)
    return Variant(rope="inside").rotated_by(RotaryFrequencies.of(frequencies, run=128))


VARIANTS: dict[str, Made] = {
    "window 1024": lambda device: built_in.sliding_window(1024),
    "sinks and window": lambda device: built_in.sinks_and_window(4, 1024),
    "chunked": lambda device: built_in.chunked(2048),
    "documents": documents(2048),
    "prefix-LM": lambda device: built_in.prefix_lm(1024),
    "dilated": lambda device: built_in.dilated(4, 512),
    "block-sparse": half_of_blocks,
    "softcap": lambda device: built_in.softcap(50.0),
    "alibi": alibi,
    "bias table": bias_table,
    "sinks": lambda device: built_in.sinks(torch.linspace(-2, 2, HEADS, device=device)),
    "sigmoid": lambda device: built_in.sigmoid(-8.0),
    "RoPE inside": rope_inside,
}
# Compiling FlexAttention takes seconds each.
IN_FLEX = ("window 1024", "documents", "softcap", "bias table")
SMALL = ("window 1024", "chunked", "softcap", "alibi")


def _shape(kind: str, rows: int, length: int, new: int) -> Shape:
    size = f"{length // 1024}k" if length >= 1024 else str(length)
    return Shape(kind, f"{rows} x {size}", (length,) * rows, (new,) * rows)


def cases(small: bool, names: Sequence[str] = ()) -> list[Case]:
    """The lines of the table; `small` ones for a device that is slow; of these variants only, if there are `names`."""
    lines = _small_cases() if small else _all_cases()
    return [line for line in lines if not names or line.name in names]


def _small_cases() -> list[Case]:
    shapes = [_shape("decode", 4, 512, 1), _shape("prefill", 1, 512, 512)]
    return [Case(name, shape, VARIANTS[name]) for shape in shapes for name in SMALL]


def _all_cases() -> list[Case]:
    decode, prefill = _shape("decode", 64, 8192, 1), _shape("prefill", 4, 4096, 4096)
    one_row = _shape("decode", 1, 8192, 1)
    found = [Case("plain", shape, lambda device: Variant(), True) for shape in (one_row, decode, prefill)]
    found.append(Case("bias table", one_row, bias_table, True))
    # As many keys as a window of 1,024 shows of 8k.
    found.append(Case("plain", _shape("decode", 64, 1024, 1), lambda device: Variant()))
    found += [Case(n, shape, make, n in IN_FLEX) for shape in (decode, prefill) for n, make in VARIANTS.items()]
    # FlexAttention does not compile for so many keys and values: its offsets mix 32 and 64 bits.
    found += [Case(n, _shape("decode", 64, LONG, 1), VARIANTS[n]) for n in ("window 1024", "sinks and window")]
    found.append(Case("documents", _shape("prefill", 1, LONG, LONG), documents(2048), True))
    return found


def seen(variant: Variant, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """`[queries, keys]`: what queries of row and head 0 see."""
    query, key, zero = q_idx[:, None], kv_idx[None], torch.zeros((), dtype=torch.int32, device=q_idx.device)
    shown = torch.ones(len(q_idx), len(kv_idx), dtype=torch.bool, device=q_idx.device)
    if variant.causal:
        shown &= key <= query
    if variant.window is not None:
        shown &= key > query - variant.window
    if variant.mask_mod is not None:
        mask = torch.vmap(torch.vmap(variant.mask_mod, (None, None, None, 0)), (None, None, 0, None))
        shown &= mask(zero, zero, q_idx, kv_idx)
    return shown


def visited(variant: Variant, shape: Shape, device: torch.device) -> tuple[float, float]:
    """Shares of plain attention of the first row: of its tiles, and of its pairs of queries and keys."""
    length, new = shape.lengths[0], shape.news[0]
    kv_idx = torch.arange(length, dtype=torch.int32, device=device)
    totals = torch.zeros(4, dtype=torch.int64, device=device)
    tokens = min(TILE_TOKENS, new)
    for first in range(length - new, length, QUERIES):
        q_idx = torch.arange(first, min(first + QUERIES, length), dtype=torch.int32, device=device)
        for place, shown in enumerate((seen(variant, q_idx, kv_idx), seen(Variant(), q_idx, kv_idx))):
            tiles = shown.view(-1, tokens, length // TILE_KEYS, TILE_KEYS).any(3).any(1)
            totals[2 * place] += tiles.sum()
            totals[2 * place + 1] += shown.sum()
    own_tiles, own_pairs, tiles, pairs = totals.tolist()
    return own_tiles / tiles, own_pairs / pairs


def agrees(inputs: Inputs, variant: Variant, out: Tensor, scale: float) -> bool:
    """The last queries of the first rows against the reference: at most three times the error of rounding its result."""
    shape, page = inputs.shape, inputs.k_pages[0].shape[1]
    rows, queries = min(len(shape.lengths), 2), min(shape.news[0], 64)
    lengths = zip(inputs.page_table.tolist(), shape.lengths[:rows], strict=False)
    table = [row[: -(-length // page)] for row, length in lengths]
    plan = ReadPlan(table, [queries] * rows, shape.lengths[:rows], page)
    ends = torch.tensor(shape.news).cumsum(0).tolist()[:rows]
    q = torch.cat([inputs.q[0][end - queries : end] for end in ends])
    want, _ = variant_attention(q.double(), inputs.k_pages[0], inputs.v_pages[0], plan, variant, scale=scale)
    ours = torch.cat([out[end - queries : end] for end in ends]).double()
    return bool((ours - want).abs().max() <= 3 * (want.to(q.dtype) - want).abs().max() + 1e-5)


def dense(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q `[B, H, S, D]`, k and v `[B, G, L, D]` of each set, random: contiguous, as FlexAttention wants them."""
    rows, length, new = len(inputs.shape.lengths), inputs.shape.lengths[0], inputs.shape.news[0]
    found = []
    for q in inputs.q:
        query = q.view(rows, new, q.shape[1], -1).transpose(1, 2).contiguous()
        pair = torch.randn(2, rows, GROUPS, length, q.shape[2], dtype=q.dtype, device=q.device)
        found.append((query, pair[0], pair[1]))
    return found
