"""Speed of the fused [qk-norm] + RoPE + append against a plain append, and against a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from hf_fastattn.eval.kernel_speed.attention_cases import COLD_BYTES, DIM, GROUPS, HEADS, MAX_SETS
from hf_fastattn.eval.kernel_speed.graph_timer import Launch, Timer, interleaved, median_ratio
from hf_fastattn.kernels.attention.append import rope_append
from hf_fastattn.kernels.page_formats import KV_DTYPES, page_bytes, page_views

TOKENS = (1, 64, 256, 8192)
PAGE = 16


def measure_append(tokens: int, norm: bool, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One line: new tokens are written to permuted slots; inputs rotate so that the second-level cache is cold.

    Args:
        tokens: new tokens (T).
        norm: with the RMSNorm on queries and keys.
    """
    moved = 2 * tokens * (HEADS + 2 * GROUPS) * DIM * dtype.itemsize
    sets = int(min(max(COLD_BYTES // moved + 1, 1), MAX_SETS))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    q, k, v = ([normal(tokens, heads, DIM) for _ in range(sets)] for heads in (HEADS, GROUPS, GROUPS))
    cos, sin = normal(2, tokens, DIM)
    weight = normal(DIM) if norm else None
    pages = -(-tokens // PAGE) + 1
    k_pages, v_pages = torch.zeros(2, pages, PAGE, GROUPS, DIM, dtype=dtype, device=device)
    slots = torch.randperm(pages * PAGE, device=device)[:tokens].contiguous()
    source = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(sets)]
    target = torch.empty_like(source[0])

    def ours(i: int) -> None:
        rope_append(q[i % sets], k[i % sets], v[i % sets], cos, sin, k_pages, v_pages, slots, q_norm=weight, k_norm=weight)

    def plain(i: int) -> None:
        k_pages.flatten(0, 1).index_copy_(0, slots, k[i % sets])
        v_pages.flatten(0, 1).index_copy_(0, slots, v[i % sets])

    def copy(i: int) -> None:
        target.copy_(source[i % sets])

    timers = [Timer(launch, max(sets, 10), device) for launch in (ours, plain, copy)]
    times = interleaved(timers, rounds)
    names = ("ours", "plain append", "copy")
    return {
        "tokens": tokens, "norm": norm,
        "us": {name: 1e6 * median(found) for name, found in zip(names, times, strict=True)},
        "ratios": {name: median_ratio(times[0], found) for name, found in zip(names[1:], times[1:], strict=True)},
    }  # fmt: skip


def measure_formats(tokens: int, kv_dtypes: Sequence[str], device: torch.device, rounds: int) -> dict[str, Any]:
    """Microseconds of the append to pages of 16 bits and of each 8-bit format, in bf16."""
    bits = torch.bfloat16
    q, k, v = (torch.randn(MAX_SETS, tokens, heads, DIM, dtype=bits, device=device) for heads in (HEADS, GROUPS, GROUPS))
    cos, sin = torch.randn(2, tokens, DIM, dtype=bits, device=device)
    pages = -(-tokens // PAGE) + 1
    slots = torch.randperm(pages * PAGE, device=device)[:tokens].contiguous()
    wide = torch.zeros(2, pages, PAGE, GROUPS, DIM, dtype=bits, device=device)
    held = {"16 bits": (wide[0], wide[1])}
    for name in kv_dtypes:
        raw = torch.zeros(pages, page_bytes(PAGE, GROUPS, DIM), dtype=torch.uint8, device=device)
        held[name] = page_views(raw, PAGE, GROUPS, DIM, KV_DTYPES[name])

    def launch(pair: tuple[torch.Tensor, torch.Tensor]) -> Launch:
        return lambda i: rope_append(q[i % MAX_SETS], k[i % MAX_SETS], v[i % MAX_SETS], cos, sin, pair[0], pair[1], slots)

    times = interleaved([Timer(launch(pair), MAX_SETS, device) for pair in held.values()], rounds)
    return {"tokens": tokens, "us": {name: 1e6 * median(found) for name, found in zip(held, times, strict=True)}}


def append_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| new tokens | qk-norm | ours, us | plain append, us | ours / plain | copy of the bytes, us | ours / copy |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        us, ratios = row["us"], row["ratios"]
        lines.append(
            f"| {row['tokens']} | {'yes' if row['norm'] else 'no'} | {us['ours']:.2f} | {us['plain append']:.2f} "
            f"| {ratios['plain append']:.2f} | {us['copy']:.2f} | {ratios['copy']:.2f} |"
        )
    return "\n".join(lines)
