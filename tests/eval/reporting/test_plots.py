"""The pictures: as wide as a page, in plain numbers and words, drawn from every record that is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn.eval.accuracy.recall_summary import draw as draw_recall
from hf_fastattn.eval.accuracy.sampling_summary import draw as draw_sampling
from hf_fastattn.eval.batching_calls.plot import draw as draw_batching
from hf_fastattn.eval.generate_speed.plot import draw_speed
from hf_fastattn.eval.harness.compare import draw as draw_tasks
from hf_fastattn.eval.kernel_speed.attention_plot import draw_attention
from hf_fastattn.eval.reporting import plot_words
from hf_fastattn.eval.reporting.plots import draw_faults, draw_logprobs, draw_parity, draw_perplexity
from hf_fastattn.eval.reporting.streaming_plot import draw_streaming

RESULTS = Path(__file__).resolve().parents[3] / "eval" / "results"
DRAW = {
    "attention": draw_attention,
    "batching": draw_batching,
    "faults": draw_faults,
    "logprobs": draw_logprobs,
    "parity": draw_parity,
    "perplexity": draw_perplexity,
    "recall": draw_recall,
    "sampling": draw_sampling,
    "speed": draw_speed,
    "streaming": draw_streaming,
    "tasks": draw_tasks,
}
# These are tables alone.
NOT_DRAWN = ("all", "matrix", "rollouts", "experts", "families", "ranks", "harness")
RECORDS = sorted(path.stem for path in RESULTS.glob("*.json") if not path.stem.startswith(NOT_DRAWN))


@pytest.fixture
def plt() -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def texts(figure: Any) -> list[str]:
    """All that can be read in a figure."""
    from matplotlib.text import Text

    figure.canvas.draw()
    return [found.get_text() for found in figure.findobj(Text) if found.get_visible() and found.get_text()]


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_drawn_in_plain_words(name: str, plt: Any) -> None:
    figure = DRAW[name.split("-")[0]](plt, json.loads((RESULTS / f"{name}.json").read_text()))
    shown = texts(figure)
    assert 7.5 <= figure.get_figwidth() <= 8.5
    # No powers of ten, no options as the command line has them, no names of our own for limits.
    assert not [text for text in shown if "$" in text or "=" in text or text in ("sdpa", "bar", "aim", "stays")]
    quantities = ("ms", "%", "nat", "limit", "their size", "tokens/s")
    assert [text for text in shown if any(text.endswith(word) or word in text for word in quantities)]
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_title() or axes.get_shared_x_axes().get_siblings(axes)[1:]


def test_errors_that_are_no_numbers_are_left_out(plt: Any) -> None:
    record = json.loads((RESULTS / "perplexity.json").read_text())
    record["series"][-1]["rms_by_phase"]["decode"] = math.nan
    record["series"][-1]["difference_interval"] = [-math.inf, math.inf]
    assert texts(draw_perplexity(plt, record))


def test_one_kind_of_attention_is_one_panel(plt: Any) -> None:
    record = json.loads((RESULTS / "attention-h200.json").read_text())
    record["rows"] = [row for row in record["rows"] if row["kind"] == "append"]
    assert len(draw_attention(plt, record).axes) == 1


def test_numbers_and_names() -> None:
    values = (1e-6, 0.001, 0.5, 20.0, 128.0, 5000.0, 3e6, 1e12)
    wanted = ["0.000001", "0.001", "0.5", "20", "128", "5,000", "3 million", "1 trillion"]
    assert [plot_words.plain(value) for value in values] == wanted
    assert plot_words.unit([0.02, math.nan]) == (1e-3, "thousandths of ") and plot_words.unit([2.0]) == (1.0, "")
    assert plot_words.series("backend=triton,cuda_graphs=True,page_size=64,share=on") == (
        "triton, CUDA graphs, pages of 64, shared pages"
    )
    assert plot_words.series("backend=reference,share=off") == "reference"
