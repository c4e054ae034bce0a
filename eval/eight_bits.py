"""What 8-bit keys and values save: decode attention, the append, and `generate()`, against 16 bits in the same process.

    python -m hf_fastattn.eval.eight_bits --output results

Each shape of attention: its correctness first, then 16 bits and each 8-bit format as CUDA-graph replays in interleaved
rounds. `generate()` is that of a model of Llama-3-8B's shape with random weights and as many layers as asked for, patched
with 16 bits and with 8; the bytes of keys and values are what the allocator gives back when pages are released. Each call
gives two figures, of its prompts and of a token after them, since prompts take most of the time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.attention import our_launch
from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.systems import System, Timing, twin
from hf_fastattn.eval.kernel_speed.append_speed import measure_formats
from hf_fastattn.eval.kernel_speed.attention_cases import DIM, GROUPS, HEADS, Shape, make_inputs
from hf_fastattn.eval.kernel_speed.ceilings import measure_ceilings
from hf_fastattn.eval.kernel_speed.eight_bit_cases import agrees, quantised
from hf_fastattn.eval.kernel_speed.graph_timer import Timer, interleaved, median_ratio
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.report import environment_lines, write
from hf_fastattn.eval.shapes import random_model

PAGE = 16
# Rows and tokens of decode, and new tokens of the append.
DECODE = ((1, 8192), (8, 1024), (64, 512), (64, 1024), (64, 2048), (64, 8192), (16, 32_768))
APPEND = (64, 8192)
SMALL = ((2, 256),)


def measure_decode(
    rows: int, length: int, names: Sequence[str], device: torch.device, rounds: int, read: float
) -> dict[str, Any]:
    """One line: microseconds in 16 bits and in each format, and their ratios."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = Shape("decode", f"{rows} x {length}", (length,) * rows, (1,) * rows)
    wide = make_inputs(shape, PAGE, device, dtype)
    narrow = {name: quantised(wide, name) for name in names}
    launches = {"16 bits": our_launch(wide), **{name: our_launch(inputs) for name, inputs in narrow.items()}}
    right = {name: agrees(inputs, launches[name](0)[0]) for name, inputs in narrow.items()}  # type: ignore[index]
    repeats = max(wide.sets, 5) if device.type == "cuda" else 2
    times = dict(zip(launches, interleaved([Timer(x, repeats, device) for x in launches.values()], rounds), strict=True))
    bytes_read = {"16 bits": shape.kv_bytes, **{name: shape.kv_bytes * 130 // 256 for name in narrow}}
    return {
        "rows": rows, "length": length, "agrees": right,
        "us": {name: 1e6 * median(found) for name, found in times.items()},
        "ratios": {name: median_ratio(times[name], times["16 bits"]) for name in narrow},
        "share_of_read": {name: bytes_read[name] / read / median(found) for name, found in times.items()},
    }  # fmt: skip


def measure_generate(
    layers: int, rows: int, prompt: int, new: int, pairs: int, names: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """First token, a token after it, and bytes of keys and values, in 16 bits and in each format."""
    on_gpu = device.type == "cuda"
    shape, dtype = ("llama-3-8b", torch.bfloat16) if on_gpu else ("qwen3-0.6b", torch.float32)
    model, case = random_model(shape, device, dtype, layers), Case("greedy", rows, prompt)
    systems = {"16 bits": System("16 bits", hf_fastattn.patch(twin(model)), new)}
    systems |= {name: System(name, hf_fastattn.patch(twin(model), kv_dtype=name), new) for name in names}
    figures: dict[str, Any] = {}
    for number in range(1 + pairs):
        for system in systems.values():
            if number:
                system.timings.append(timed_call(system, case, number))
                print(system.name, system.timings[-1], flush=True)
            else:
                with system.watched():
                    timed_call(system, case, number)
    for system in systems.values():
        call = hf_fastattn.report(system.model).last_call
        assert call is not None
        held, before = hf_fastattn.report(system.model).page_bytes_allocated, allocated(device)
        system.model._fastattn.runtime.groups.shrink(0.0)
        figures[system.name] = {
            "first_s": median(timing.first for timing in system.timings),
            "token_s": median(timing.token for timing in system.timings),
            "page_bytes": held,
            "allocator_bytes": before - allocated(device) if on_gpu else held,
            "peak": system.peak,
            "fast_loops": call.fast_loops,
            "fallbacks": dict(call.fallbacks),
        }
    return {"shape": shape, "layers": layers, "rows": rows, "prompt": prompt, "new": new, "systems": figures}


def timed_call(system: System, case: Case, number: int) -> Timing:
    """One call on the prompts `number`: the seconds until their logits are there, and of each token after the first."""
    model, ends = system.model, list[float]()
    prefill = model._prefill

    def watched_prefill(*args: Any, **kwargs: Any) -> Any:
        out = prefill(*args, **kwargs)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        ends.append(time.perf_counter())
        return out

    model._prefill = watched_prefill
    try:
        whole = system.seconds(case, number, 1 + system.new)
        # The prompts are made, and sent to the device, before the call.
        first = whole - (time.perf_counter() - ends[0])
        return Timing(first, (whole - first) / system.new)
    finally:
        del model._prefill


def allocated(device: torch.device) -> int:
    """Bytes that tensors take on a CUDA device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def table(record: dict[str, Any], names: Sequence[str]) -> str:
    """The record as Markdown."""
    lines = []
    if record["decode"]:
        columns = "".join(f" {name}, us | / 16 bits | of reading |" for name in names)
        lines = ["| decode, rows x keys | 16 bits, us |" + columns, "|" + "---|" * (2 + 3 * len(names))]
    for row in record["decode"]:
        cells = [f"{row['rows']} x {row['length']}", f"{row['us']['16 bits']:.1f}"]
        for name in names:
            wrong = "" if row["agrees"][name] else " WRONG"
            cells += [f"{row['us'][name]:.1f}", f"{row['ratios'][name]:.3f}{wrong}", f"{row['share_of_read'][name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if record["append"]:
        lines += ["", "| append, new tokens | 16 bits, us |" + "".join(f" {name}, us |" for name in names)]
        lines += ["|" + "---|" * (2 + len(names))]
    for tokens in record["append"]:
        lines.append(f"| {tokens['tokens']} | {tokens['us']['16 bits']:.2f} |" + "".join(
            f" {tokens['us'][name]:.2f} |" for name in names
        ))  # fmt: skip
    for found in record["generate"]:
        lines += [
            "", f"`generate()`, {found['shape']} with {found['layers']} layers, {found['rows']} prompts of "
            f"{found['prompt']} tokens, {found['new']} new:", "",
            "| | first token, ms | / 16 bits | a token, ms | / 16 bits | K/V, MiB | / 16 bits | peak, MiB |",
            "|" + "---|" * 8,
        ]  # fmt: skip
        base = found["systems"]["16 bits"]
        for name, own in found["systems"].items():
            figures = [("first_s", 1e3), ("token_s", 1e3), ("allocator_bytes", 2**-20)]
            cells = [f"{own[key] * unit:.2f} | {own[key] / base[key]:.3f}" for key, unit in figures]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {(own['peak'] or 0) * 2**-20:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser("bench eight-bits").parse(argv)
    device = torch.device(default_device())
    on_gpu, names = device.type == "cuda", options.kv_dtype
    read = measure_ceilings(device, torch.bfloat16 if on_gpu else torch.float32).read
    decode = []
    shapes = () if options.only_generate else DECODE if on_gpu else SMALL
    for rows, length in shapes:
        decode.append(measure_decode(rows, length, names, device, options.rounds, read))
        print(decode[-1], flush=True)
    generate = []
    if options.batch:
        sizes = (options.layers, options.batch, options.prompt, options.new) if on_gpu else (2, 2, 64, 4)
        layers, rows, prompt, new = sizes
        generate.append(measure_generate(layers, rows, prompt, new, options.pairs, names, device))
    record = {
        "command": command("hf_fastattn.eval.eight_bits", argv),
        "environment": environment(device),
        "read_tbs": read / 1e12,
        "decode": decode,
        "append": [measure_formats(tokens, names, device, options.rounds) for tokens in APPEND if shapes and on_gpu],
        "generate": generate,
    }
    lines = [
        "# Keys and values in 8 bits",
        "",
        environment_lines(record),
        "",
        f"H {HEADS}, G {GROUPS}, D {DIM}, pages of {PAGE}, permuted; medians of {options.rounds} rounds. Memory read in "
        f"this run: {record['read_tbs']:.3g} TB/s.",
        "",
        table(record, names),
    ]
    write(options.output, "eight-bits", "\n".join(lines), record, None)
    fine = all(all(row["agrees"].values()) for row in decode)
    return 0 if fine and not any(system["fallbacks"] for found in generate for system in found["systems"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
