"""The table of `bench tasks`."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.reporting import report

WORDS = {
    "fastattn_next_line": "lines to choose from, the same five examples before each",
    "fastattn_next_line_drawn": "the same, examples drawn for each",
    "fastattn_pairs": "words of one token, the same five examples before each",
    "fastattn_pairs_drawn": "the same, examples drawn for each",
    "fastattn_continue": "texts to go on from",
}


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    settings = record["settings"]
    size = f", {settings['layers']} layers" if settings["layers"] else ""
    lines = [
        "# lm-evaluation-harness: stock and patched",
        "",
        f"{settings['shape'] or 'A checkpoint'}{size}, {record['dtype']}, batch size {settings['batch']}. Stock is `HFLM`; "
        "ours is `FastLM` on the same weights. Tokens: what all requests hold, of these the distinct ones (each common "
        "beginning counted once), and what was computed. Memory with the weights.",
        "",
        "| task | requests | stock, s | ours, s | times as fast | tokens, all | distinct | computed | peak GiB, stock "
        "| ours | rms difference, nats | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        counts, peaks = row["counts"], row["peak_bytes"]
        tokens = [f"{counts[name]:,}" if counts["asked"] else "" for name in ("asked", "distinct", "computed")]
        memory = [f"{peaks[name] / 2**30:.1f}" if peaks[name] else "" for name in ("stock", "ours")]
        nats = f"{row['rms_nats']:.2g}" if "rms_nats" in row else f"{row['same']} of {row['requests']} texts equal"
        cells = [
            WORDS.get(row["name"], row["name"]),
            str(row["requests"]),
            f"{row['stock_seconds']:.2f}",
            f"{row['ours_seconds']:.2f}",
        ]
        cells += [f"{row['ratio']:.2f}", *tokens, *memory, nats, "; ".join(row["red"]) or "ok"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nFAILED: {one['name']}: {one['error']}" for one in record["failed"]]
    return "\n".join([*lines, "", report.environment_lines(record)])
