"""Speed of the decode of rows that share prefixes: against ours without sharing, page by page, and FlashInfer's figures."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from hf_fastattn.eval.kernel_speed.attention_cases import DIM, HEADS
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings
from hf_fastattn.eval.kernel_speed.graph_timer import Launch, Timer, interleaved, median_ratio
from hf_fastattn.eval.kernel_speed.shared_cases import (
    SharedInputs,
    SharedShape,
    make_shared_inputs,
    shared_agrees,
    shared_shapes,
)

SCALE = DIM**-0.5
# The shape whose speed says whether the page-by-page kernel is a fair peer: nothing is shared.
UNSHARED = SharedShape(64, 1, 0, 8192, HEADS)
PEER = "page by page"
WORDS = (
    f"H {HEADS}, D {DIM}; each prompt is stored once, and all kernels read the same page tables. GB/s: keys and values that "
    "rows attend to, each row's counted, by the time. `not shared`: our decode without sharing; `page by page`: one program "
    "a row and head, as in vLLM 0.2.6. FlashInfer: recorded with 0.6.18 on another H200; what its kernels can be composed "
    "to by hand is last."
)
# Seconds that the launches of one graph take at most.
GRAPH_SECONDS = 20e-3


def shared_launches(inputs: SharedInputs) -> dict[str, Launch]:
    """On a GPU, of set i: `ours`, ours `not shared`, and PEER where no heads are grouped."""
    from hf_fastattn.eval.kernel_speed.page_by_page import page_by_page
    from hf_fastattn.kernels.attention.decode import paged_decode
    from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.kernels.backends import choose_backend
    from hf_fastattn.kernels.variants.compiled import compile_variant
    from hf_fastattn.kernels.variants.hooks import PLAIN

    sets = list(zip(inputs.q, inputs.k_pages, inputs.v_pages, strict=True))
    device, batch = inputs.page_table.device, (inputs.page_table, inputs.seq_lens)
    variant = PLAIN if inputs.variant is None else compile_variant(inputs.variant, DIM, device)
    options: dict[str, Any] = {"scale": SCALE, "workspace": Workspace(device), "variant": variant}
    hopper = choose_backend("auto", device, inputs.q[0].dtype, DIM)[0] == "hopper"
    groups = (inputs.group_starts, inputs.prefix_lens)
    found: dict[str, Launch] = {
        "ours": lambda i: paged_decode_shared(
            *sets[i % len(sets)], *batch, *groups, max_group_rows=inputs.shape.samples, hopper=hopper, **options
        )[0],
        "not shared": lambda i: paged_decode(*sets[i % len(sets)], *batch, **options)[0],
    }
    if inputs.shape.kv_heads == HEADS:
        found[PEER] = lambda i: page_by_page(*sets[i % len(sets)], *batch, scale=SCALE)
    return found


def reference_launches(inputs: SharedInputs) -> dict[str, Launch]:
    """On a CPU: the reference with and without the prefixes; of a variant without them alone."""
    from hf_fastattn.kernels.attention import reference
    from hf_fastattn.kernels.attention.read_plan import ReadPlan
    from hf_fastattn.kernels.attention.variant_reference import variant_attention

    shape, page = inputs.shape, inputs.k_pages[0].shape[1]
    pages = (inputs.q[0], inputs.k_pages[0], inputs.v_pages[0])
    starts = inputs.group_starts.tolist()
    groups = [(first, past, shape.prefix // page) for first, past in zip(starts, starts[1:], strict=False)]
    batch = (inputs.page_table.tolist(), [1] * shape.rows, inputs.seq_lens.tolist(), page)
    shared, alone, variant = ReadPlan(*batch, prefixes=groups), ReadPlan(*batch), inputs.variant
    if variant is not None:
        return {"ours": lambda i: variant_attention(*pages, alone, variant, scale=SCALE)[0]}
    return {
        "ours": lambda i: reference.paged_attention(*pages, shared, scale=SCALE)[0],
        "not shared": lambda i: reference.paged_attention(*pages, alone, scale=SCALE)[0],
    }


def measure_shared(
    shape: SharedShape, page: int, device: torch.device, dtype: torch.dtype, rounds: int, ceilings: Ceilings
) -> dict[str, Any]:
    """One line of the table; only the name and `agrees: False` if one of the results is wrong."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    inputs = make_shared_inputs(shape, page, device, dtype)
    launches = (shared_launches if on_gpu else reference_launches)(inputs)
    row: dict[str, Any] = {"shape": shape.name, "agrees": all(shared_agrees(inputs, one(0)) for one in launches.values())}  # type: ignore[arg-type]
    if not row["agrees"]:
        return row
    limit = max(shape.operations / ceilings.matmul, shape.stored_bytes / ceilings.read)
    # As many launches as a graph has time for; none takes less than reading every row's keys from the fastest cache.
    most = GRAPH_SECONDS / max(limit, shape.attended_bytes / (4 * ceilings.read))
    repeats = max(inputs.sets, min(max(int(most), 1), 20)) if on_gpu else 2
    timers = {name: Timer(launch, repeats, device) for name, launch in launches.items()}
    times = dict(zip(timers, interleaved(list(timers.values()), rounds), strict=True))
    row["us"] = {name: 1e6 * median(found) for name, found in times.items()}
    row["ratios"] = {name: median_ratio(found, times["ours"]) for name, found in times.items() if name != "ours"}
    row["limit_us"], row["share_of_limit"] = 1e6 * limit, limit / median(times["ours"])
    row["tflops"] = shape.operations / median(times["ours"]) / 1e12
    # What is attended to, as if each row had read it: the figure that sharing raises above the speed of memory.
    row["gbs"] = {name: shape.attended_bytes / median(found) / 1e9 for name, found in times.items()}
    row["flashinfer_us"] = [1e3 * known for known in shape.flashinfer or ()]
    return row


def bench_shared(
    page: int, device: torch.device, dtype: torch.dtype, rounds: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """The lines of the table; on a GPU the last one is that of the page-by-page kernel on rows that share nothing."""
    found = []
    for shape in shared_shapes(small=device.type == "cpu"):
        found.append(measure_shared(shape, page, device, dtype, rounds, ceilings))
        print(found[-1], flush=True)
    if device.type == "cuda":
        found.append(measure_peer(UNSHARED, page, device, dtype, rounds, ceilings))
        print(found[-1], flush=True)
    return found


def measure_peer(
    shape: SharedShape, page: int, device: torch.device, dtype: torch.dtype, rounds: int, ceilings: Ceilings
) -> dict[str, Any]:
    """The page-by-page kernel on rows that share nothing: which share of the speed of memory it reaches."""
    torch.cuda.empty_cache()
    inputs = make_shared_inputs(shape, page, device, dtype)
    launch = shared_launches(inputs)[PEER]
    row: dict[str, Any] = {"shape": f"{shape.rows} rows that share nothing", "agrees": shared_agrees(inputs, launch(0))}  # type: ignore[arg-type]
    if row["agrees"]:
        timer = Timer(launch, 3, device)
        seconds = median(timer() for _ in range(rounds))
        row |= {"us": {PEER: 1e6 * seconds}, "gbs": {PEER: shape.stored_bytes / seconds / 1e9}}
        row["share_of_read"] = shape.stored_bytes / seconds / ceilings.read
    return row


def shared_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, and what its columns mean."""
    head = ["shape", "ours, us", "TFLOP/s", "limit, us", "share of the limit", "GB/s"]
    peers = [name for name in ("not shared", PEER) if any(name in row.get("us", {}) for row in rows)]
    head += [column for name in peers for column in (f"{name}, us", "GB/s", f"{name} / ours")]
    head += ["FlashInfer, us: no cascade", "cascade", "composed", "its best / ours"]
    lines = [WORDS, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row, peers, len(head))) + " |" for row in rows)])


def _cells(row: dict[str, Any], peers: list[str], count: int) -> list[str]:
    if not row["agrees"]:
        return [row["shape"], "WRONG RESULT", *[""] * (count - 2)]
    us, gbs, cells = row["us"], row["gbs"], [row["shape"]]
    if "ours" in us:
        cells += [f"{us['ours']:.1f}", f"{row['tflops']:.1f}", f"{row['limit_us']:.1f}", f"{row['share_of_limit']:.2f}"]
        cells.append(f"{gbs['ours']:.0f}")
    else:
        cells += [""] * 5
    for name in peers:
        cells += [f"{us[name]:.1f}", f"{gbs[name]:.0f}"] if name in us else ["", ""]
        # Of the page-by-page kernel alone there is its share of the speed of memory.
        share = f"{row['share_of_read']:.2f} of the read ceiling" if name == PEER and "share_of_read" in row else ""
        cells.append(f"{row['ratios'][name]:.2f}" if name in row.get("ratios", {}) else share)
    known = row.get("flashinfer_us")
    return cells + ([*(f"{one:.0f}" for one in known), f"{min(known) / us['ours']:.2f}"] if known else [""] * 4)
