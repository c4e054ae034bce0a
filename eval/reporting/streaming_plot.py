"""The picture of `eval streaming`: perplexity along the stream, time a token, and memory."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.reporting.plot_words import plain
from hf_fastattn.eval.reporting.plots import GRID_COLOUR, OUR_COLOURS, STOCK_COLOURS, WIDTH


def draw_streaming(plt: Any, record: dict[str, Any]) -> Any:
    """Above: perplexity of stretches of the stream. Below, if tokens were generated: milliseconds and memory of each."""
    made = record["generated"]
    figure, panels = plt.subplots(
        1 if made is None else 3, 1, figsize=(WIDTH, 3.2 if made is None else 7.2), constrained_layout=True, squeeze=False
    )
    upper, *lower = panels[:, 0]
    figure.suptitle(f"Generation without end: {record['model']}, {record['dtype']}", fontsize=11)
    for (name, curve), colour in zip(record["curves"].items(), (OUR_COLOURS[0], STOCK_COLOURS[0]), strict=True):
        width = record["tokens"] / len(curve)
        upper.plot([(place + 0.5) * width for place in range(len(curve))], curve, ".-", color=colour, label=name)
    places = plain(record["places"])
    again = f"encoded again by stock, mean of {places} places"
    upper.axhline(record["again"]["perplexity"], color=STOCK_COLOURS[1], linewidth=0.9, linestyle="--", label=again)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter(plain)
    upper.yaxis.set_minor_formatter(plain)
    upper.set_xlabel("token of the stream", fontsize=9)
    upper.set_ylabel("perplexity", fontsize=9)
    ratio = record["series"][0]["ratio"]
    upper.set_title(f"streaming at these places {100 * (ratio - 1):+.2f}% against encoding again", fontsize=9)
    upper.legend(fontsize=8, frameon=False)
    if made is not None:
        _flat(lower[0], made["ms_a_token"], made["new"], "ms a token")
        _flat(lower[1], [size / 1e6 for size in made["bytes"]], made["new"], "MB of memory")
    for axes in panels[:, 0]:
        axes.xaxis.set_major_formatter(plain)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color=GRID_COLOUR)
    return figure


def _flat(axes: Any, values: list[float], new: int, quantity: str) -> None:
    """What is to stay as it is, over the tokens that were generated."""
    axes.plot([(place + 0.5) * new / len(values) for place in range(len(values))], values, ".-", color=OUR_COLOURS[0])
    axes.set_ylim(0, 1.25 * max(values))
    axes.set_xlabel("new token", fontsize=9)
    axes.set_ylabel(quantity, fontsize=9)
