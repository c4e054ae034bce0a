"""Speed of the attention kernels against PyTorch's, FlashInfer's and the memory's.

    python -m hf_fastattn.eval.attention --output results
    python -m hf_fastattn.eval.attention --variants
    python -m hf_fastattn.eval.attention --variants "window 1024" documents --kind prefill

Each shape: its correctness first (no speed is printed on red), then ours, PyTorch's `scaled_dot_product_attention` on
contiguous keys and values, and FlashInfer where it is installed, as CUDA-graph replays in interleaved rounds. Keys and
values rotate through more memory than the second-level cache holds. The limit of a shape is what reading its keys and
values takes at the measured speed of memory, or its products at that of a matrix product, whichever takes longer. Rows
that share prefixes have a table of their own.
Without a GPU the reference runs small shapes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.kernel_speed.append_speed import TOKENS, append_table, measure_append
from hf_fastattn.eval.kernel_speed.attention_cases import DIM, GROUPS, HEADS, Inputs, Shape, agrees, make_inputs, shapes
from hf_fastattn.eval.kernel_speed.attention_plot import draw_attention
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings, measure_ceilings
from hf_fastattn.eval.kernel_speed.flashinfer_peer import flashinfer_launches
from hf_fastattn.eval.kernel_speed.graph_timer import Launch, Timer, interleaved, median_ratio
from hf_fastattn.eval.kernel_speed.shared_speed import bench_shared, shared_table
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.report import environment_lines, write

SCALE = DIM**-0.5
LAYOUT_SHAPES = ("1 x 8k", "16 x 8k", "64 x 1k", "16 on 8k, B 16", "4 x 4k")
PAGE_SIZES = (16, 64, 256)


def our_launch(inputs: Inputs) -> Launch:
    """Paged attention of set i: Triton on a GPU, the reference elsewhere."""
    sets = list(zip(inputs.q, inputs.k_pages, inputs.v_pages, strict=True))
    if inputs.page_table.device.type != "cuda":
        from hf_fastattn.kernels.attention import reference
        from hf_fastattn.kernels.attention.read_plan import ReadPlan

        plan = ReadPlan(
            [[page for page in row if page >= 0] for row in inputs.page_table.tolist()],
            inputs.shape.news,
            inputs.shape.lengths,
            inputs.k_pages[0].shape[1],
        )
        return lambda i: reference.paged_attention(*sets[i % len(sets)], plan, scale=SCALE)
    from hf_fastattn.kernels.attention.paged import paged_attention
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.kernels.backends import choose_backend

    workspace, longest = Workspace(inputs.page_table.device), max(inputs.shape.news)
    begins = None if longest == 1 else inputs.cu_seqlens_q
    batch = (inputs.page_table, begins, inputs.seq_lens)
    options: dict[str, Any] = {"max_query_len": longest, "scale": SCALE, "workspace": workspace}
    options["hopper"] = choose_backend("auto", inputs.q[0].device, inputs.q[0].dtype, DIM)[0] == "hopper"
    return lambda i: paged_attention(*sets[i % len(sets)], *batch, **options)


def sdpa_launch(inputs: Inputs) -> Launch | None:
    """PyTorch's attention on contiguous `[B, G, L, D]` keys and values; None for ragged rows and appends."""
    shape = inputs.shape
    if not shape.is_uniform or shape.kind == "append":
        return None
    rows, length, new = len(shape.lengths), shape.lengths[0], shape.news[0]
    like = inputs.q[0]
    dense = [torch.randn(2, rows, GROUPS, length, DIM, dtype=like.dtype, device=like.device) for _ in range(inputs.sets)]
    if shape.kind == "prefill":
        # Heads expanded beforehand: PyTorch's fastest path takes no grouped heads.
        dense = [pair.repeat_interleave(HEADS // GROUPS, 2) for pair in dense]
    queries = [q.view(rows, new, HEADS, DIM).transpose(1, 2) for q in inputs.q]
    options: dict[str, Any] = {"is_causal": True} if shape.kind == "prefill" else {"enable_gqa": True}
    return lambda i: F.scaled_dot_product_attention(
        queries[i % len(queries)], dense[i % len(dense)][0], dense[i % len(dense)][1], **options
    )


def measure(
    shape: Shape, page: int, device: torch.device, dtype: torch.dtype, rounds: int, ceilings: Ceilings
) -> dict[str, Any]:
    """One line of the table; only the name and `agrees: False` if the result is wrong."""
    if device.type == "cuda":
        # Memory that a larger shape has left in pieces was seen to cost the next one a tenth of its speed.
        torch.cuda.empty_cache()
    inputs = make_inputs(shape, page, device, dtype)
    ours = our_launch(inputs)
    row: dict[str, Any] = {"kind": shape.kind, "shape": shape.name, "agrees": agrees(inputs, ours(0)[0])}  # type: ignore[index]
    if not row["agrees"]:
        return row
    limit = max(shape.operations / ceilings.matmul, shape.kv_bytes / ceilings.read)
    launches = {"ours": ours, "sdpa": sdpa_launch(inputs), **flashinfer_launches(inputs)}
    repeats = max(inputs.sets, min(max(int(2e-3 / limit), 1), 20)) if device.type == "cuda" else 3
    timers = {name: Timer(launch, repeats, device) for name, launch in launches.items() if launch is not None}
    times = dict(zip(timers, interleaved(list(timers.values()), rounds), strict=True))
    row["us"] = {name: 1e6 * median(found) for name, found in times.items()}
    row["limit_us"] = 1e6 * limit
    row["share_of_limit"] = limit / median(times["ours"])
    row["ratios"] = {name: median_ratio(times["ours"], found) for name, found in times.items() if name != "ours"}
    row["tflops"] = shape.operations / median(times["ours"]) / 1e12
    row["gbs"] = shape.kv_bytes / median(times["ours"]) / 1e9
    return row


def measure_layouts(device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of some shapes by the order of a page in memory and the tokens it holds."""
    found = []
    for shape in shapes(small=False):
        if shape.name not in LAYOUT_SHAPES:
            continue
        timers, names = [], []
        for heads_first in (False, True):
            for page in PAGE_SIZES:
                inputs = make_inputs(shape, page, device, dtype, heads_first)
                names.append(f"{'HND' if heads_first else 'NHD'} {page}")
                timers.append(Timer(our_launch(inputs), max(inputs.sets, 5), device))
        times = interleaved(timers, rounds)
        medians = {name: 1e6 * median(t) for name, t in zip(names, times, strict=True)}
        found.append({"shape": f"{shape.kind}, {shape.name}", "us": medians})
    return found


def layout_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0]["us"])
    lines = ["| shape, us | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {row['shape']} | " + " | ".join(f"{row['us'][name]:.1f}" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    peers = sorted({name for row in rows for name in row.get("ratios", {})})
    head = ["shape", "ours, us", "GB/s", "TFLOP/s", "limit, us", "share of the limit"]
    head += [column for name in peers for column in (f"{name}, us", f"ours / {name}")]
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines += ["", f"### {kind}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in (row for row in rows if row["kind"] == kind):
            if not row["agrees"]:
                lines.append(f"| {row['shape']} | WRONG RESULT |" + " |" * (len(head) - 2))
                continue
            cells = [row["shape"], f"{row['us']['ours']:.1f}", f"{row['gbs']:.0f}", f"{row['tflops']:.1f}"]
            cells += [f"{row['limit_us']:.1f}", f"{row['share_of_limit']:.2f}"]
            for name in peers:
                known = name in row["ratios"]
                cells += [f"{row['us'][name]:.1f}", f"{row['ratios'][name]:.2f}"] if known else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a result was wrong."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parser("bench attention").parse(argv)
    device = torch.device(default_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        print("no GPU: the PyTorch reference at small sizes; these figures say nothing about the kernels")
    if options.variants is not None:
        from hf_fastattn.eval.kernel_speed.variant_speed import bench_variants

        return bench_variants(options, argv, device, dtype)
    start = time.perf_counter()
    ceilings = measure_ceilings(device, dtype)
    rows = []
    for shape in shapes(small=device.type == "cpu"):
        if options.kind and shape.kind not in options.kind:
            continue
        rows.append(measure(shape, options.page_size, device, dtype, options.rounds, ceilings))
        print(rows[-1], flush=True)
    on_gpu = device.type == "cuda"
    with_shared = not options.kind or "shared" in options.kind
    shared = bench_shared(options.page_size, device, dtype, options.rounds, ceilings) if with_shared else []
    appends = []
    if on_gpu:
        appends = [measure_append(t, norm, device, dtype, options.rounds) for norm in (False, True) for t in TOKENS]
    layouts = measure_layouts(device, dtype, options.rounds) if on_gpu and options.layouts else []
    record = {
        "command": command("hf_fastattn.eval.attention", argv),
        "environment": environment(device),
        "dtype": str(dtype),
        "page_size": options.page_size,
        "ceilings": {
            "read_tbs": ceilings.read / 1e12,
            "copy_tbs": ceilings.copy / 1e12,
            "matmul_tflops": ceilings.matmul / 1e12,
        },
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "shared": shared,
        "append": appends,
        "layouts": layouts,
    }
    found = record["ceilings"]
    lines = [
        "# Attention kernels",
        "",
        environment_lines(record),
        "",
        f"H {HEADS}, G {GROUPS}, D {DIM}, {record['dtype']}, pages of {options.page_size}, permuted; medians of "
        f"{options.rounds} rounds. Ceilings in this run: read {found['read_tbs']:.3g} TB/s, copy {found['copy_tbs']:.3g} "
        f"TB/s, matrix product {found['matmul_tflops']:.3g} TFLOP/s. `sdpa`: contiguous keys and values, the same bytes.",
        table(rows),
    ]
    if shared:
        lines += ["", "### decode of rows that share prefixes", "", shared_table(shared)]
    if appends:
        lines += ["", "### [qk-norm] + RoPE + append, one launch", "", append_table(appends)]
    if layouts:
        lines += ["", "### Order of a page in memory, and tokens it holds", "", layout_table(layouts)]
    write(options.output, "attention", "\n".join(lines), record, lambda plt: draw_attention(plt, record))
    return 0 if all(row["agrees"] for row in [*rows, *shared]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
