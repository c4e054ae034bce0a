"""The picture of the attention benchmark: which share of the measured limit each shape reaches."""

from __future__ import annotations

from typing import Any

COLOURS = {"ours": "#1f77b4", "sdpa": "#8d99a6", "flashinfer": "#2ca02c", "recorded": "#98df8a"}
NAMES = {
    "ours": "hf_fastattn",
    "sdpa": "PyTorch, contiguous keys and values",
    "flashinfer": "FlashInfer",
    "recorded": "FlashInfer, its best in an earlier run",
}
TITLES = {
    "decode": "decode: rows x keys of a row",
    "append": "append: new tokens on keys before them, B rows",
    "prefill": "prefill: rows x tokens",
    "shared": "decode of rows that share prefixes: rows of the prefix's keys",
}


def draw_attention(plt: Any, record: dict[str, Any]) -> Any:
    """A panel a kind; bars are ours and the peers', as a share of the limit that the same run measured."""
    rows = [row for row in (*record["rows"], *shared_rows(record)) if row["agrees"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure = plt.figure(figsize=(8, 3.3 * (2 if len(kinds) > 1 else 1)), layout="constrained")
    figure.suptitle(
        f"Attention on {record['environment']['device']}: speed as a share of what the device allows", fontsize=11
    )
    for panel, kind in zip(_panels(figure, rows, kinds), kinds, strict=True):
        _bars(panel, [row for row in rows if row["kind"] == kind])
        panel.set_title(TITLES[kind], fontsize=9)
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("share of the limit", fontsize=9)
    handles = {
        label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    return figure


def shared_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes of the table of shared prefixes that have a limit, as rows of a kind of their own."""
    rows = []
    for row in record.get("shared", ()):
        if row.get("limit_us"):
            peers = {"recorded": min(row["flashinfer_us"])} if row.get("flashinfer_us") else {}
            us = {"ours": row["us"]["ours"], **peers}
            rows.append(
                {"kind": "shared", "shape": row["shape"], "agrees": row["agrees"], "us": us, "limit_us": row["limit_us"]}
            )
    return rows


def _panels(figure: Any, rows: list[dict[str, Any]], kinds: list[str]) -> list[Any]:
    """The first kind above, as wide as the page; the others below it share a line by their number of shapes."""
    if len(kinds) < 2:
        return [figure.subplots()] if kinds else []
    counts = [sum(row["kind"] == kind for row in rows) for kind in kinds[1:]]
    above, below = figure.subfigures(2, 1)
    return [above.subplots(), *below.subplots(1, len(counts), width_ratios=counts, sharey=True, squeeze=False)[0]]


def _bars(panel: Any, shown: list[dict[str, Any]]) -> None:
    names = [name for name in COLOURS if any(name in row["us"] for row in shown)]
    for index, name in enumerate(names):
        found = [(place, row) for place, row in enumerate(shown) if name in row["us"]]
        places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place, _ in found]
        shares = [row["limit_us"] / row["us"][name] for _, row in found]
        panel.bar(places, shares, 0.75 / len(names), color=COLOURS[name], label=NAMES[name])
    panel.axhline(1, color="black", linewidth=0.8, label="measured speed of memory or of a matrix product")
    panel.set_xticks(range(len(shown)), [_label(row["shape"]) for row in shown], rotation=45, ha="right", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    panel.grid(axis="y", color="#eeeeee")
    panel.set_axisbelow(True)


def _label(shape: str) -> str:
    """A long name on two lines."""
    head, comma, tail = shape.partition(", ")
    return f"{head},\n{tail}" if comma and len(shape) > 16 else shape
