"""The report of calls that begin alike, as Markdown and as a picture."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.reporting import report

WAYS = ("stock", "unshared", "shared", "kept")
NOTES = """First: a call of one token; a token: of stock the difference between calls of `1 + new` tokens and of one, over
`new`, of ours on a GPU the time from the prompt to the end of the former, over `new`; ms, medians of interleaved rounds on
other questions about the same documents. `unshared`: ours, each row by itself; `shared`: ours; `kept`: ours with
`prefix_cache=True`, whose calls find the documents of the calls before. Computed: prompt tokens. Peak: MB over the weights.
`samples`: rows are copies of one prompt; `fours`: of each prompt four; `groups`: three documents, of a half and two quarters
of the rows; `nested`: four documents after one system prompt, rows in turn; `turns`: a chat, medians over its turns."""
HEAD = ("case", *(f"first, {way}" for way in WAYS), *(f"token, {way}" for way in WAYS), "computed, shared", "kept", "least")
HEAD = (*HEAD, "peak, stock", "unshared", "shared")


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    settings = record["settings"]
    lines = ["# Rows and calls that begin alike", "", report.environment_lines(record), ""]
    layers = f", {settings['layers']} layers" if settings["layers"] else ""
    lines += [f"`{settings['shape']}`{layers}, random weights, {record['dtype']}; `own` {settings['own']}, `new` "]
    lines[-1] += f"{settings['new']}, {settings['pairs']} rounds."
    lines += ["", NOTES, "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in record["cases"]]
    lines += [""] + [f"- **RED** {row['name']}: {', '.join(row['red'])}" for row in record["cases"] if row["red"]]
    lines += [f"- **{found['name']} failed**: {found['error']}" for found in record["failed"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    held = row["systems"]

    def figure(way: str, word: str, form: str = ".2f", scale: float = 1.0) -> str:
        value = held.get(way, {}).get(word)
        return "" if value is None else format(value * scale, form)

    cells = [row["name"], *(figure(way, "first", ".1f") for way in WAYS), *(figure(way, "token") for way in WAYS)]
    cells += [figure("shared", "computed", "d", 1), figure("kept", "computed", "d", 1), str(row["least"])]
    return [*cells, *(figure(way, "peak", ".0f", 1e-6) for way in WAYS[:3])]


def draw(pyplot: Any, record: dict[str, Any]) -> Any:
    """First token and time a token against the number of rows, a line a way, a row of axes a kind."""
    cases = [row for row in record["cases"] if row["kind"] != "turns"]
    kinds = list(dict.fromkeys(row["kind"] for row in cases)) or ["none"]
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(10, 3 * len(kinds)), squeeze=False, constrained_layout=True)
    for place, kind in enumerate(kinds):
        for column, word in enumerate(("first", "token")):
            at = axes[place][column]
            for length in dict.fromkeys(row["length"] for row in cases if row["kind"] == kind):
                own = [row for row in cases if (row["kind"], row["length"]) == (kind, length)]
                for way in WAYS:
                    points = [(row["rows"], row["systems"][way][word]) for row in own if way in row["systems"]]
                    at.plot(*zip(*points, strict=True), marker=".", label=f"{way}, {length}") if points else None
            at.set(title=f"{kind}: {word} (ms)", xlabel="rows", xscale="log", yscale="log")
    axes[0][0].legend(fontsize=6)
    return figure
