"""Every reason for which a call does as Transformers does comes with what the user can do about it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_fastattn
from hf_fastattn.hints import HINTS, hint_for
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import single, tiny

PACKAGE = Path(hf_fastattn.__file__).parent
# Where the reasons of a report come from; those of layers that are not fused are in none.
PLACES = (
    "generation",
    "graphs",
    "loop",
    "cache",
    "patches/decoder",
    "patches/modules",
    "runtime.py",
    "autocast.py",
    "layer_variants.py",
)
COUNTED = ("count_not_looped", "count_fallback", "count_unshared", "count_reason")


def files(place: str) -> list[Path]:
    return [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).glob("*.py"))


def reasons() -> Iterator[tuple[str, str]]:
    """(where it stands, the reason with X for what is filled in)."""
    for place in PLACES:
        for path in files(place):
            for node in ast.walk(ast.parse(path.read_text())):
                for text in filter(None, map(_text, _given(node))):
                    yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", text


def _given(node: ast.AST) -> list[ast.AST]:
    """What a function returns as a reason, or what a counter is given as one."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in COUNTED:
        return [node.args[0]]
    if not isinstance(node, ast.FunctionDef) or node.returns is None or node.name == "_describe":
        return []
    returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value is not None]
    return list(returned) if "str" in ast.unparse(node.returns) else []


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.IfExp):
        return _text(node.body) or _text(node.orelse)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_part, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _part(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return CACHE if ast.unparse(node) == "{CACHE}" or getattr(getattr(node, "value", None), "id", "") == "CACHE" else "X"


def test_every_reason_has_a_hint() -> None:
    found = list(reasons())
    assert len(found) > 60
    assert [(place, reason) for place, reason in found if not hint_for(reason)] == []


def test_no_hint_is_for_nothing() -> None:
    """Parts of reasons that nobody gives."""
    sources = "".join(path.read_text() for place in (*PLACES, "pages", "parallel") for path in files(place))
    named = [part for part, _ in HINTS if not part.startswith(("cache ", "past_key_values ", "of ", "("))]
    assert [part for part in named if part.strip() not in sources and "past_key_values" not in part] == []


def test_report_and_log_say_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    model = hf_fastattn.patch(tiny("llama"))
    model.model.layers[1].register_forward_hook(lambda *given: None)
    with caplog.at_level("INFO", "hf_fastattn"), torch.no_grad():
        model.generate(**single(), max_new_tokens=2, do_sample=False, use_cache=False)
    text = str(hf_fastattn.report(model))
    assert "use_cache=False" in text and hint_for("use_cache=False") in text
    assert any(hint_for("use_cache=False") in record.getMessage() for record in caplog.records)
