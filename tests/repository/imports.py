"""Who imports whom: rooms, levels and arrows of the package, and circles; run as `python -m tests.repository.imports`.

A room is a folder with its Python files, or one file that stands beside folders. Imports behind `TYPE_CHECKING` and inside
functions count: they hide a circle from Python, not from a reader.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = "hf_fastattn"
Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Every module below the package's folder, symlinks followed: `cache.batch` -> its file."""
    found: dict[str, Path] = {}
    folders = [package]
    while folders:
        folder = folders.pop()
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name not in ("__pycache__", "work", "results"):
                folders.append(path)
            elif path.suffix == ".py" and path.name != "__init__.py":
                found[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return found


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """The known modules that a file imports, anywhere in it."""
    known, found = set(known), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            module = node.module.removeprefix(PACKAGE).lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found |= {inner} & known or {module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(PACKAGE + ".") for alias in node.names} & known
    return found


def file_graph(package: Path) -> Graph:
    """Module -> the modules that it imports."""
    files = modules(package)
    return {name: imports(path, files) - {name} for name, path in files.items()}


def rooms(graph: Mapping[str, set[str]], inside: str = "", whole: Iterable[str] = ()) -> Graph:
    """The graph of rooms: of the whole package, or of one of its folders by itself.

    Args:
        inside: the folder.
        whole: folders that are one room with all that is below them; others are taken apart.
    """
    prefix = f"{inside}." if inside else ""
    whole = tuple(f"{name}." for name in whole)

    def room(module: str) -> str:
        module = module.removeprefix(prefix)
        top = next((name[:-1] for name in whole if module.startswith(name)), None)
        return top or (module.rpartition(".")[0] or module)

    found: Graph = {}
    for module, others in graph.items():
        if module.startswith(prefix):
            mine = room(module)
            found.setdefault(mine, set()).update(room(other) for other in others if other.startswith(prefix))
    return {name: others - {name} for name, others in found.items()}


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of two or more that import each other (strongly connected components; Tarjan, 1972)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        numbers[node] = lowest[node] = len(numbers)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in numbers:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == numbers[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in numbers:
            visit(node)
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How many imports lie below each room at most; rooms of a circle count as one."""
    groups = circles(graph)
    of = {name: next((place for place, group in enumerate(groups) if name in group), name) for name in graph}
    heights: dict[str | int, int] = {}

    def height(node: str | int) -> int:
        if node not in heights:
            heights[node] = 0
            below = {of[other] for name in graph if of[name] == node for other in graph[name]} - {node}
            heights[node] = max((height(other) + 1 for other in below), default=0)
        return heights[node]

    return {name: height(of[name]) for name in graph}


def describe(title: str, graph: Mapping[str, set[str]]) -> str:
    """One line of figures, then the rooms of each level."""
    heights = levels(graph)
    arrows, found = sum(map(len, graph.values())), circles(graph)
    lines = [f"{title}: {len(graph)} rooms on {len(set(heights.values()))} levels, {arrows} arrows, {len(found)} circles"]
    for level in sorted(set(heights.values())):
        lines.append(f"  {level:2}  {', '.join(sorted(name for name in graph if heights[name] == level))}")
    return "\n".join([*lines, *(f"  circle: {', '.join(sorted(group))}" for group in found)])


def main(package: Path) -> None:
    graph = file_graph(package)
    print(describe("the house", rooms(graph, whole=("kernels", "patches", "eval"))))
    for folder in ("kernels", "patches", "eval"):
        print(describe(folder, rooms(graph, folder)))
    print(f"files: {len(graph)}, circles among them: {[sorted(group) for group in circles(graph)]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else PACKAGE))
