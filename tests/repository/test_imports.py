"""A folder is a floor: imports run downwards only, and no two files import each other."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_fastattn
from tests.repository import imports

PACKAGE = Path(hf_fastattn.__file__).parent
WHOLE = ("kernels", "patches", "eval")
# Each room may import what stands before it.
HOUSE = (
    "version", "transformers_version", "hints", "wrappers", "uncompiled", "autocast", "stream_layout", "config", "counters",
    "expansion", "kernels", "parallel", "quantised", "layer_variants", "counted_reasons", "dense", "stock_batching",
    "interface", "pages", "cache", "call", "graphs", "loop", "runtime", "patches", "streaming", "batching",
    "generation", "patching", "memory", "search", "report", "warming", "serving", "eval", "cli", "__main__",
)  # fmt: skip
FLOORS = {
    "kernels": (
        "page_formats",
        "launch",
        "assembly",
        "compile_aside",
        "rehearsal",
        "relaunch",
        "carve_out",
        "quick_launch",
        "gluon_spelling",
        "layer",
        "experts",
        "variants",
        "attention",
        "quantised",
        "linear",
        "sampling",
        "backends",
        "ops",
    ),
    "patches": ("family", "families", "registry", "modules", "attention", "fused", "decoder"),
}


@pytest.fixture(scope="module")
def graph() -> imports.Graph:
    return imports.file_graph(PACKAGE)


def upwards(rooms: imports.Graph, order: tuple[str, ...]) -> list[str]:
    """The imports that run against the order."""
    return [f"{name} imports {other}" for name in rooms for other in rooms[name] if order.index(other) >= order.index(name)]


def test_the_house(graph: imports.Graph) -> None:
    assert upwards(imports.rooms(graph, whole=WHOLE), HOUSE) == []


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_by_itself(graph: imports.Graph, folder: str) -> None:
    assert upwards(imports.rooms(graph, folder), FLOORS[folder]) == []


def test_no_circle_among_files(graph: imports.Graph) -> None:
    assert imports.circles(graph) == []


def test_an_import_upwards_and_a_circle_are_seen(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "runtime.py").write_text("from hf_fastattn.pages import table\n")
    (tmp_path / "pages" / "table.py").write_text("def f():\n    from hf_fastattn.runtime import Runtime\n")
    graph = imports.file_graph(tmp_path)
    assert upwards(imports.rooms(graph), HOUSE) == ["pages imports runtime"]
    assert imports.circles(graph) == [{"pages.table", "runtime"}]
