"""Speed of the experts' kernels against PyTorch's grouped product and the device's ceilings.

    python -m hf_fastattn.eval.experts --output results

Each line: its correctness first (no speed is printed on red), then the experts of one layer for a number of tokens whose
experts are given (the router is not timed), and two grouped products of PyTorch with `silu(gate) * up` between them,
without the weighted sum over experts, as CUDA-graph replays in interleaved rounds. Other tokens go to other experts in
every repetition. The limit is what reading the weights of the chosen experts takes at the measured speed of memory, or the
products at that of a matrix product, whichever takes longer. Without a GPU the reference runs a small shape.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings, measure_ceilings
from hf_fastattn.eval.kernel_speed.expert_cases import SETS, Inputs, agrees, experts_of, make_inputs, make_weights
from hf_fastattn.eval.kernel_speed.graph_timer import Launch, Timer, interleaved, median_ratio
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.report import environment_lines, write
from hf_fastattn.kernels.experts import reference

HEAD = ("tokens", "routing", "experts", "ours, us", "TB/s", "TFLOP/s", "limit, us", "share of the limit")
PEER = ("grouped_mm, us", "ours / grouped_mm")


def our_launch(inputs: Inputs) -> Launch:
    """The experts of variant i: our kernels on a GPU, the reference elsewhere."""
    x, routings, weights = inputs.x, inputs.routings, (inputs.gate_up_proj, inputs.down_proj)
    if x[0].device.type != "cuda":

        def plain(i: int) -> torch.Tensor:
            routing = routings[i % SETS]
            return reference.down_sum(reference.gate_up_silu(x[i % SETS], routing, weights[0]), routing, weights[1])

        return plain
    from hf_fastattn.kernels.backends import choose_backend, gluon_experts
    from hf_fastattn.kernels.experts.mixture import mixture
    from hf_fastattn.kernels.layer.split_sums import SplitSums

    options: dict[str, Any] = {"sums": SplitSums(x[0].device), "weights_settled": True}
    options["hopper"] = gluon_experts(choose_backend("auto", x[0].device, x[0].dtype, 128)[0])
    return lambda i: mixture(x[i % SETS], routings[i % SETS], *weights, **options)


def grouped_launch(inputs: Inputs) -> Launch | None:
    """PyTorch's grouped products of rows gathered in the order of their experts; None where there is no such product."""
    product = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None or inputs.x[0].device.type != "cuda":
        return None
    top_k = inputs.sizes.top_k
    orders = [routing.chosen.flatten().argsort() // top_k for routing in inputs.routings]
    counts = [routing.chosen.flatten().long().bincount(minlength=inputs.sizes.experts) for routing in inputs.routings]
    ends = [count.cumsum(0, dtype=torch.int32) for count in counts]
    gate_up, down = inputs.gate_up_proj.transpose(1, 2), inputs.down_proj.transpose(1, 2)

    def launch(i: int) -> torch.Tensor:
        at = i % SETS
        gate, up = product(inputs.x[at][orders[at]], gate_up, offs=ends[at]).chunk(2, -1)
        return product(functional.silu(gate) * up, down, offs=ends[at])

    return launch


def measure(inputs: Inputs, routing: str, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """One line of the table; without figures if the result is wrong."""
    ours, theirs = our_launch(inputs), grouped_launch(inputs)
    device = inputs.x[0].device
    row: dict[str, Any] = {
        "model": inputs.sizes.name, "tokens": inputs.x[0].shape[0], "routing": routing, "experts": inputs.distinct,
        "agrees": agrees(inputs, ours(0)),  # type: ignore[arg-type]
    }  # fmt: skip
    if not row["agrees"]:
        return row
    limit = max(inputs.operations / ceilings.matmul, inputs.weight_bytes / ceilings.read)
    launches = {"ours": ours} if theirs is None else {"ours": ours, "grouped_mm": theirs}
    timers = [Timer(launch, SETS, device) for launch in launches.values()]
    times = dict(zip(launches, interleaved(timers, rounds), strict=True))
    row["us"] = {name: 1e6 * median(found) for name, found in times.items()}
    row["limit_us"] = 1e6 * limit
    row["share_of_limit"] = limit / median(times["ours"])
    row["ratios"] = {name: median_ratio(times["ours"], found) for name, found in times.items() if name != "ours"}
    row["tbs"] = inputs.weight_bytes / median(times["ours"]) / 1e12
    row["tflops"] = inputs.operations / median(times["ours"]) / 1e12
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table a model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        sizes = experts_of(model)
        lines += [
            "", f"### {model}: H {sizes.hidden}, I {sizes.inner}, E {sizes.experts}, K {sizes.top_k}", "",
            "| " + " | ".join(HEAD + PEER) + " |", "|" + "---|" * len(HEAD + PEER),
        ]  # fmt: skip
        lines += [_line(row) for row in rows if row["model"] == model]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    cells = [str(row["tokens"]), row["routing"], f"{row['experts']:.1f}"]
    if not row["agrees"]:
        return "| " + " | ".join(cells) + " | WRONG RESULT |" + " |" * (len(HEAD + PEER) - 4)
    cells += [f"{row['us']['ours']:.1f}", f"{row['tbs']:.2f}", f"{row['tflops']:.3g}"]
    cells += [f"{row['limit_us']:.1f}", f"{row['share_of_limit']:.2f}"]
    known = "grouped_mm" in row["us"]
    cells += [f"{row['us']['grouped_mm']:.1f}", f"{row['ratios']['grouped_mm']:.2f}"] if known else ["", ""]
    return "| " + " | ".join(cells) + " |"


def measure_all(options: Any, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Every number of tokens and routing of every model that was asked for."""
    rows = []
    for name in options.model if device.type == "cuda" else ["small"]:
        sizes = experts_of(name)
        weights = make_weights(sizes, device, dtype)
        for tokens in options.tokens:
            for routing in options.routing:
                inputs = make_inputs(sizes, tokens, routing, weights, device)
                rows.append(measure(inputs, routing, options.rounds, ceilings))
                print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a result was wrong."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parser("bench experts").parse(argv)
    device = torch.device(default_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        print("no GPU: the PyTorch reference of a small shape; these figures say nothing about the kernels")
    start = time.perf_counter()
    torch.manual_seed(0)
    with torch.no_grad():
        ceilings = measure_ceilings(device, dtype)
        rows = measure_all(options, device, dtype, ceilings)
    record = {
        "command": command("hf_fastattn.eval.experts", argv),
        "environment": environment(device),
        "dtype": str(dtype),
        "ceilings": {"read_tbs": ceilings.read / 1e12, "matmul_tflops": ceilings.matmul / 1e12},
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    lines = [
        "# Experts",
        "",
        environment_lines(record),
        "",
        f"{record['dtype']}, random weights; medians of {options.rounds} rounds. Ceilings in this run: read "
        f"{ceilings.read / 1e12:.3g} TB/s, matrix product {ceilings.matmul / 1e12:.3g} TFLOP/s. TB/s are of the weights of "
        "chosen experts. `zipf`: the n-th expert as popular as 1/n; `one`: all tokens to the same K experts. `grouped_mm`: "
        "two of them, with gathered rows and `silu(gate) * up`, but no weighted sum.",
        table(rows),
    ]
    write(options.output, "experts", "\n".join(lines), record, None)
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
