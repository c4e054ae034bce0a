"""The report of a model that is spread over ranks, as Markdown."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.reporting import report

NOTES = """First: a call of one token; a token: the difference between calls of `1 + new` tokens and of one, over `new`; ms,
medians of whole calls of `generate()`, on other prompts each. Systems are measured one after the other. Limit: reading this
rank's weights and keys once, at the speed measured in the same run."""
HEAD = ("case", "a token, ms", "limit", "first token, ms", "one GPU, a token", "first", "stock, a token", "first")
SUM_NAMES = ("group", "group_norm", "peers_norm", "pushed_norm", "one_shot")
SUMS = (
    "rows", "bytes", "process group, back to back, us", "with residual and norm between",
    "sum, residual and norm in one launch", "the same, pushed", "one-shot",
)  # fmt: skip


SAMPLES_NOTES = """First: from the call to the first step; a token: between the tokens of two steps of the device's loop,
the median behind its first ones; ms, medians of whole calls of `generate()`, sampled, on other prompts each; less by: the
median over pairs of calls, one behind the other. Shared: a prompt is computed once, and attention reads its pages once for
all samples where that pays; alone: each sample computes and reads its own."""
SAMPLES = ("case", "first, shared, ms", "alone", "less by", "a token, shared, ms", "alone", "less by")


def samples_markdown(record: dict[str, Any]) -> str:
    """The whole report of samples."""
    settings = record["settings"]
    lines = ["# Samples of a model over several GPUs", "", report.environment_lines(record), ""]
    lines += [f"{settings['model']}, {settings['dtype']}, {settings['ranks']} ranks, `new` {settings['new']}, "]
    lines[-1] += f"{settings['pairs']} rounds."
    rows = []
    for row in record["cases"]:
        cells = [f"{row['prompts']} x {row['prompt']}, {row['samples']} samples each"]
        for name in ("first", "token"):
            shared, alone = row["shared"][f"{name}_ms"], row["alone"][f"{name}_ms"]
            cells += [_shown(shared), _shown(alone), f"{100 * (1 - row[f'{name}_ratio']):.1f}%"]
        rows.append(cells)
    lines += ["", SAMPLES_NOTES, "", *_table(SAMPLES, rows), ""]
    lines += [f"- **{found['case']} failed**: {found['error']}" for found in record["failed"]]
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    settings = record["settings"]
    lines = ["# A model over several GPUs", "", report.environment_lines(record), ""]
    lines += [f"{settings['model']}, {settings['dtype']}, {settings['ranks']} ranks, `new` {settings['new']}"]
    lines[-1] += f" (stock {settings['stock_new']}), {settings['pairs']} rounds. Sums of few rows: {record['peers']}."
    lines += ["", NOTES, "", *_table(HEAD, [_cells(row) for row in record["cases"]]), ""]
    if record["sums"]:
        cells = [
            [str(row["rows"]), str(row["bytes"]), *(_shown(row.get(name)) for name in SUM_NAMES)] for row in record["sums"]
        ]
        lines += ["Sums over ranks, as replays of CUDA graphs of many:", "", *_table(SUMS, cells), ""]
    lines += [f"- **RED** {row['name']}: {', '.join(row['problems'])}" for row in record["cases"] if row["problems"]]
    lines += [f"- **{found['case']} failed**: {found['error']}" for found in record["failed"]]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["name"], _shown(row["ours"]["token_ms"]), _shown(row["limit_ms"]), _shown(row["ours"]["first_ms"])]
    for other in ("one", "stock"):
        cells += [_shown(None if row[other] is None else row[other][name]) for name in ("token_ms", "first_ms")]
    return cells


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
