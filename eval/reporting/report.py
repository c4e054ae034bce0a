"""The report of an evaluation: Markdown for people, JSON for programs, PNG for the eye."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_fastattn.eval.accuracy.processes import processes


def write(folder: Path | None, name: str, markdown: str, record: dict[str, Any], draw: Callable[[Any], Any] | None) -> None:
    """Print the report, and write `name.md`, `name.json` and `name.png` into `folder` if there is one.

    Of several processes the first one does.

    Args:
        draw: takes `matplotlib.pyplot` and returns a figure. Without matplotlib there is no picture, and a line says so.
    """
    if not processes().is_first:
        return
    print(markdown)
    if folder is None:
        return
    save(folder, name, markdown, record)
    pyplot = _pyplot() if draw is not None else None
    if draw is not None and pyplot is not None:
        figure = draw(pyplot)
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    print(f"written: {name}.md, {name}.json{', ' + name + '.png' if pyplot else ''} in {folder}")


def save(folder: Path | None, name: str, markdown: str, record: dict[str, Any]) -> None:
    """The files of `write` alone, without a picture: for what is known in the middle of a long run."""
    if folder is None or not processes().is_first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib, pip install 'hf-fastattn[eval]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has no words for: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def environment_lines(record: dict[str, Any]) -> str:
    """Where and how it ran, as Markdown."""
    where = ", ".join(f"{name} {value}" for name, value in record["environment"].items() if name != "device")
    lines = [f"`{record['command']}`", "", f"{record['environment']['device']}; {where}."]
    if "seconds" in record:
        lines.append(f"Took {record['seconds']:.0f} s.")
    return "\n".join(lines)
