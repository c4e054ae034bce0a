"""The report of `sampling`: its tests, and histograms of the numbers that tokens were drawn by."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.reporting import report


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    count = sum(len(case["tests"]) for case in record["cases"])
    off = ", ".join(f"{case['name']}: {'; '.join(case['off_loop'])}" for case in record["cases"] if case["off_loop"])
    lines = [
        f"# Draws: {record['verdict']}",
        "",
        f"What drew them: {record['path']}{f' ({off})' if off else ''}. {count} tests; a p-value, corrected for their "
        f"number by Holm's method, below {record['level']:g} alarms.",
        "",
        "| options | test | p | corrected | |",
        "|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        words = ", ".join(f"{name} {value:g}" for name, value in case["options"].items()) or "none"
        words += f", rows end ({100 * case['ended']:.0f}% before the last step)" if case["ended"] else ""
        for test in case["tests"]:
            state = "**ALARM**" if test["alarms"] else "ok"
            lines.append(f"| {words} | {test['name']} | {test['p']:.2g} | {test['corrected']:.2g} | {state} |")
    lines += ["", "| options | tokens | never drawn by stock |", "|---|---|---|"]
    lines += [f"| {case['name']} | {case['tokens']:,} | {100 * case['impossible_share']:.3g}% |" for case in record["cases"]]
    return "\n".join([*lines, "", report.environment_lines(record)])


def draw(plt: Any, record: dict[str, Any]) -> Any:
    """For each case how the numbers lie between 0 and 1, and the band that 95% of such bars lie in."""
    cases = record["cases"]
    columns = 4
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(8.0, 0.8 + 1.6 * rows), squeeze=False, constrained_layout=True)
    figure.suptitle("The numbers that tokens were drawn by are uniform", fontsize=11)
    for place, case in enumerate(cases):
        one = axes[place // columns][place % columns]
        counts = case["histogram"]
        mean = sum(counts) / len(counts)
        spread = 196 * ((1 - 1 / len(counts)) / mean) ** 0.5 if mean else 0.0
        one.axhspan(100 - spread, 100 + spread, color="#dde3e8")
        one.bar([(i + 0.5) / len(counts) for i in range(len(counts))], [100 * n / mean for n in counts], 0.8 / len(counts))
        one.set_title(case["name"], fontsize=8)
        one.set_xlabel("number", fontsize=7)
        one.set_ylabel("% of the mean", fontsize=7)
        one.set_ylim(50, 150)
        one.tick_params(labelsize=7)
    for place in range(len(cases), rows * columns):
        axes[place // columns][place % columns].set_axis_off()
    return figure
