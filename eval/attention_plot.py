"""The picture of the attention benchmark: which share of the measured ceiling each shape reaches."""

from __future__ import annotations

from typing import Any

COLOURS = {"ours": "#1f77b4", "sdpa": "#8d99a6", "flashinfer": "#2ca02c"}


def draw_attention(plt: Any, record: dict[str, Any]) -> Any:
    """One panel a kind; bars are ours and the peers', as a share of the ceiling of the same run."""
    rows = [row for row in record["rows"] if row["agrees"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    widths = [max(sum(row["kind"] == kind for row in rows), 2) for kind in kinds]
    figure, panels = plt.subplots(1, len(kinds), figsize=(2.5 + 0.75 * sum(widths), 4.8), width_ratios=widths, sharey=True)
    figure.suptitle(f"Attention on {record['environment']['device']}: share of the measured ceiling")
    for panel, kind in zip(panels if len(kinds) > 1 else [panels], kinds, strict=True):
        shown = [row for row in rows if row["kind"] == kind]
        names = [name for name in COLOURS if any(name in row["us"] for row in shown)]
        for index, name in enumerate(names):
            places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in range(len(shown))]
            shares = [row["limit_us"] / row["us"][name] if name in row["us"] else 0 for row in shown]
            panel.bar(places, shares, 0.75 / len(names), color=COLOURS[name], label=name)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(shown)), [row["shape"] for row in shown], rotation=60, ha="right", fontsize=8)
        panel.set_title(kind, fontsize=10)
    handles = {
        label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower left", frameon=False)
    figure.tight_layout()
    return figure
