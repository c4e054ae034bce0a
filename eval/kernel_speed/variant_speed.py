"""Speed of attention variants: against plain attention for what they visit, and against compiled FlexAttention."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch

from hf_fastattn.eval.kernel_speed.attention_cases import DIM, GROUPS, HEADS, Inputs, make_inputs
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings, measure_ceilings
from hf_fastattn.eval.kernel_speed.graph_timer import Launch, Timer, interleaved, median_ratio
from hf_fastattn.eval.kernel_speed.variant_cases import TILE_KEYS, TILE_TOKENS, Case, agrees, cases, visited
from hf_fastattn.eval.reporting.environment import command, environment
from hf_fastattn.eval.reporting.report import environment_lines, write
from hf_fastattn.kernels.variants.variant import Variant

SCALE = DIM**-0.5


def variant_launches(inputs: Inputs, variant: Variant) -> dict[str, Launch]:
    """Of set i: the variant and plain attention by the fastest kernel, and both by the Triton kernel if that is another.

    With a mask also the lists of tiles that it shows, which are made once for all layers, and the variant without them.
    """
    from hf_fastattn.kernels.attention.paged import paged_attention, visited_tiles
    from hf_fastattn.kernels.attention.visited import Visited
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.kernels.backends import choose_backend
    from hf_fastattn.kernels.variants.compiled import compile_variant

    device, longest = inputs.page_table.device, max(inputs.shape.news)
    sets = list(zip(inputs.q, inputs.k_pages, inputs.v_pages, strict=True))
    batch = (inputs.page_table, None if longest == 1 else inputs.cu_seqlens_q, inputs.seq_lens)
    options: dict[str, Any] = {"max_query_len": longest, "scale": SCALE, "workspace": Workspace(device)}
    hopper = choose_backend("auto", device, inputs.q[0].dtype, DIM)[0] == "hopper"
    compiled = compile_variant(variant, DIM, device)

    def attend(more: dict[str, Any]) -> Launch:
        return lambda i: paged_attention(*sets[i % len(sets)], *batch, **{**options, **more})

    def lists(hopper: bool) -> Visited | None:
        return visited_tiles(sets[0][0], sets[0][1], *batch, **own, hopper=hopper)

    own: dict[str, Any] = {"max_query_len": longest, "workspace": options["workspace"], "variant": compiled}
    tiled, fastest = lists(False), lists(hopper)
    found: dict[str, Launch] = {
        "ours": attend({"variant": compiled, "visited": fastest, "hopper": hopper}),
        "plain": attend({"hopper": hopper}),
    }
    if hopper and longest > 1:
        found["triton"] = attend({"variant": compiled, "visited": tiled})
        found["plain triton"] = attend({})
    if tiled is not None:
        found["all tiles"] = attend({"variant": compiled})
    if fastest is not None:
        found["lists"] = lambda i: lists(hopper)
    return found


def reference_launches(inputs: Inputs, variant: Variant) -> dict[str, Launch]:
    """On a CPU: the reference of variants, and of plain attention."""
    from hf_fastattn.kernels.attention import reference
    from hf_fastattn.kernels.attention.read_plan import ReadPlan
    from hf_fastattn.kernels.attention.variant_reference import variant_attention

    table = [[page for page in row if page >= 0] for row in inputs.page_table.tolist()]
    plan = ReadPlan(table, inputs.shape.news, inputs.shape.lengths, inputs.k_pages[0].shape[1])
    pages = (inputs.q[0], inputs.k_pages[0], inputs.v_pages[0])
    return {
        "ours": lambda i: variant_attention(*pages, plan, variant, scale=SCALE),
        "plain": lambda i: reference.paged_attention(*pages, plan, scale=SCALE),
    }


def measure_variant(
    case: Case, page: int, device: torch.device, dtype: torch.dtype, rounds: int, ceilings: Ceilings
) -> dict[str, Any]:
    """One line of the table; only the names and `agrees: False` if the result is wrong."""
    on_gpu = device.type == "cuda"
    inputs, variant, shape = make_inputs(case.shape, page, device, dtype), case.make(device), case.shape
    launches = (variant_launches if on_gpu else reference_launches)(inputs, variant)
    row: dict[str, Any] = {"variant": case.name, "kind": shape.kind, "shape": shape.name}
    row["agrees"] = agrees(inputs, variant, launches["ours"](0)[0], SCALE)  # type: ignore[index]
    if not row["agrees"]:
        return row
    if on_gpu and case.flex:
        from hf_fastattn.eval.kernel_speed.flex_peer import flex_launch

        launches["flex"] = flex_launch(inputs, variant, SCALE)
    tiles, pairs = visited(variant, shape, device)
    limit = max(pairs * shape.operations / ceilings.matmul, tiles * shape.kv_bytes / ceilings.read)
    repeats = max(inputs.sets, min(max(int(2e-3 / limit), 1), 20)) if on_gpu else 3
    timers = {name: Timer(launch, repeats, device) for name, launch in launches.items()}
    times = dict(zip(timers, interleaved(list(timers.values()), rounds), strict=True))
    row["us"] = {name: 1e6 * median(found) for name, found in times.items()}
    row["ratios"] = {name: median_ratio(times["ours"], found) for name, found in times.items() if name != "ours"}
    row["visited"] = tiles
    row["cost"] = {name: ratio / tiles for name, ratio in row["ratios"].items() if name == "plain"}
    row["tflops"] = pairs * shape.operations / median(times["ours"]) / 1e12
    row["gbs"] = (tiles if shape.kind == "decode" else 1.0) * shape.kv_bytes / median(times["ours"]) / 1e9
    return row


def variant_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["variant", "ours, us", "GB/s", "TFLOP/s", "visited", "time / plain", "cost of what is visited"]
    peers = [
        name
        for name in ("flex", "triton", "plain triton", "all tiles", "lists")
        if any(name in row.get("us", {}) for row in rows)
    ]
    head += [column for name in peers for column in (f"{name}, us", f"ours / {name}")]
    lines = []
    for kind, shape in dict.fromkeys((row["kind"], row["shape"]) for row in rows):
        lines += ["", f"### {kind}, {shape}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in (row for row in rows if (row["kind"], row["shape"]) == (kind, shape)):
            if not row["agrees"]:
                lines.append(f"| {row['variant']} | WRONG RESULT |" + " |" * (len(head) - 2))
                continue
            cells = [row["variant"], f"{row['us']['ours']:.1f}", f"{row['gbs']:.0f}", f"{row['tflops']:.1f}"]
            cells += [f"{row['visited']:.3f}", f"{row['ratios']['plain']:.3f}", f"{row['cost']['plain']:.2f}"]
            for name in peers:
                known = name in row["us"]
                cells += [f"{row['us'][name]:.1f}", f"{row['ratios'][name]:.2f}"] if known else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_variants(options: argparse.Namespace, argv: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """`bench attention --variants`; 1 if a result was wrong."""
    start, rows = time.perf_counter(), []
    ceilings = measure_ceilings(device, dtype)
    for case in cases(device.type == "cpu", options.variants):
        if options.kind and case.shape.kind not in options.kind:
            continue
        rows.append(measure_variant(case, options.page_size, device, dtype, options.rounds, ceilings))
        print(rows[-1], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record = {
        "command": command("hf_fastattn.eval.attention", argv),
        "environment": environment(device),
        "dtype": str(dtype),
        "page_size": options.page_size,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    lines = [
        "# Attention variants",
        "",
        environment_lines(record),
        "",
        f"H {HEADS}, G {GROUPS}, D {DIM}, {record['dtype']}, pages of {options.page_size}, permuted; medians of "
        f"{options.rounds} rounds. `visited`: tiles of {TILE_TOKENS} queries and {TILE_KEYS} keys with a visible pair, as a "
        "share of those of plain attention; `cost`: time for these against plain attention; `triton` and `plain "
        "triton`: not by the Gluon kernel; `flex`: compiled FlexAttention on contiguous keys and values; `all tiles`: "
        "without the lists of tiles that a mask shows; `lists`: making them, once for all layers.",
        variant_table(rows),
    ]
    write(options.output, "attention-variants", "\n".join(lines), record, None)
    return 0 if all(row["agrees"] for row in rows) else 1
