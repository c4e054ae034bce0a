"""`FIGURES`: what a record has found, in a line, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]


def _perplexity(record: Figures) -> str:
    ours = [row for row in record["series"] if "=" in row["series"]]
    stock = next(row for row in record["series"] if row["series"] == "stock")
    most = max((abs(row["difference"]) for row in ours), default=0.0)
    return f"perplexity {stock['perplexity']:.2f} for both; ours differs by {most:.1e} nats a token at most"


def _parity(record: Figures) -> str:
    ours = [row for row in record["series"] if "=" in row["series"]]
    same, kl = min(row["top1"] for row in ours), max(row["mean_kl"] for row in ours)
    return f"likeliest tokens as the exact model's: {100 * same:.2f}%; KL divergence {kl:.1e} nats"


def _faults(record: Figures) -> str:
    planted = [row for row in record["rows"] if row["fault"]]
    clean = [row for row in record["rows"] if not row["fault"]]
    names = ", ".join(dict.fromkeys(row["fault"] for row in planted))
    alarms = sum(row["verdict"] != "green" for row in clean)
    return f"faults planted: {names}; {alarms} alarms in {len(clean)} runs without one"


def _logprobs(record: Figures) -> str:
    stock = next(row["rms"] for row in record["series"] if row["series"] == "stock")
    most = max(row["rms"] for row in record["series"] if row["series"] != "stock")
    return f"a later forward differs by {most:.1e} nats (rms) from ours at most, by {stock:.1e} from stock's"


def _families(record: Figures) -> str:
    families, variants = {row["family"] for row in record["rows"]}, [v for row in record["rows"] for v in row["variants"]]
    most = max(variant["share"] for variant in variants)
    return f"{len(families)} families with random weights; the largest share of a limit is {most:.2f} (1 alarms)"


def _streaming(record: Figures) -> str:
    found = ", ".join(f"{name} {value:.2f}" for name, value in record["perplexities"].items())
    return f"perplexity over {record['tokens']:,} tokens through a window of {record['window']:,}: {found}"


def _all(record: Figures) -> str:
    run = [one for one in record["outcomes"] if one["seconds"]]
    return f"{len(run)} evaluations in {sum(one['cpu_seconds'] for one in run):.0f} s of the processor"


def _recall(record: Figures) -> str:
    return "; ".join(
        f"{one['task']}: stock {100 * one['stock']:.1f}%, ours {100 * one['ours']:.1f}%" for one in record["tasks"]
    )


def _tasks(record: Figures) -> str:
    seconds = record["task_seconds"].values()
    ratio = sum(one["stock"] for one in seconds) / sum(one["ours"] for one in seconds)
    return f"{len(record['tasks'])} tasks scored alike, {ratio:.1f} times as fast as HFLM in all"


def _sampling(record: Figures) -> str:
    tests = [test for case in record["cases"] for test in case["tests"]]
    tokens = sum(case["tokens"] for case in record["cases"])
    least = min(test["corrected"] for test in tests)
    return f"{len(tests)} tests of {tokens:,} draws by {record['path']}; smallest corrected p {least:.2g}"


def _speed(record: Figures) -> str:
    found = [case for case in record["cases"] if "stock" in case["systems"] and "patched" in case["systems"]]
    ratios = [case["systems"]["stock"]["token_ms"] / case["systems"]["patched"]["token_ms"] for case in found]
    return f"a token {_span(ratios)} times as fast as stock's, cases: {len(found)}" if ratios else ""


def _batching(record: Figures) -> str:
    found = []
    for case in record["cases"]:
        systems = {name: one.get("seconds") for name, one in case["systems"].items()}
        if systems.get("ours") and systems.get("stock_batch"):
            found.append(f"{case['name']}: {systems['stock_batch'] / systems['ours']:.1f} times as fast as stock's batches")
        elif systems.get("ours") and systems.get("patched_padded"):
            found.append(f"{case['name']}: {systems['ours'] / systems['patched_padded']:.2f} of our padded calls' time")
        slowest = case["systems"].get("ours", {}).get("slowest")
        if slowest:
            found.append(f"{case['name']}: a step beside a long prompt takes at most {slowest:.1f} times as long")
    return "; ".join(found)


def _ranks(record: Figures) -> str:
    less = [100 * (1 - case["token_ratio"]) for case in record["cases"] if "samples" in case]
    if less:
        return f"{record['settings']['ranks']} ranks: a token of samples takes {_span(less)}% less with shared prompts"
    ratios = [case["stock"]["token_ms"] / case["ours"]["token_ms"] for case in record["cases"] if case.get("stock")]
    return f"{record['settings']['ranks']} ranks: a token {_span(ratios)} times as fast as stock's" if ratios else ""


def _span(values: list[float]) -> str:
    """`2.1 to 3.4`, or one figure where they are alike."""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def _matrix(record: Figures) -> str:
    cells = [cell["ratios"]["token"] for cell in record["cells"] if "token" in cell.get("ratios", {})]
    return (
        f"{len(record['cells'])} cells; a token takes {min(cells):.2f} to {max(cells):.2f} of stock's time" if cells else ""
    )


def _rollouts(record: Figures) -> str:
    ratios = [state["stock"][1] / state["ours"][1] for state in record["states"]]
    return f"a token {min(ratios):.1f} to {max(ratios):.1f} times as fast as stock's, {len(ratios)} states of a trainer"


def _kernels(record: Figures) -> str:
    ratios = [value for row in record["rows"] for value in row["ratios"].values()]
    found = (
        [f"{min(ratios):.2f} to {max(ratios):.2f} of the time of PyTorch's, {len(record['rows'])} shapes"] if ratios else []
    )
    saved = [row["ratios"]["not shared"] for row in record.get("shared", ()) if "not shared" in row.get("ratios", {})]
    if saved:
        found.append(
            f"shared prefixes read {min(saved):.1f} to {max(saved):.1f} times as fast as row by row, {len(saved)} shapes"
        )
    return "; ".join(found)


def _harness(record: Figures) -> str:
    ratios = [case["ratio"] for case in record["cases"]]
    return (
        f"lm-evaluation-harness {min(ratios):.2f} to {max(ratios):.2f} times as fast, {len(ratios)} tasks" if ratios else ""
    )


FIGURES: dict[str, Callable[[Figures], str]] = {
    "perplexity": _perplexity,
    "parity": _parity,
    "logprobs": _logprobs,
    "faults": _faults,
    "families": _families,
    "all": _all,
    "streaming": _streaming,
    "recall": _recall,
    "tasks": _tasks,
    "sampling": _sampling,
    "speed": _speed,
    "batching": _batching,
    "matrix": _matrix,
    "rollouts": _rollouts,
    "ranks": _ranks,
    "attention": _kernels,
    "experts": _kernels,
    "harness": _harness,
}
