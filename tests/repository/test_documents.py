"""What documents name is there: links, files, folders and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels/README.md", *ROOT.glob("docs/**/*.md")])
# A path is named from one of these; Transformers' own files are looked up in what is installed.
FOLDERS = ("hf_fastattn", "kernels", "patches", "eval", "tests")
PLACES = (ROOT, *(ROOT / folder for folder in FOLDERS), Path(transformers.__file__).parent)
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml))`")
LINK = re.compile(r"\]\((?!http)([^)#]+)")
TEST = re.compile(r"`(test_\w+)`")


def files() -> dict[str, Path]:
    return {path.name: path for folder in (*FOLDERS, "examples") for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_is_there(document: Path) -> None:
    text, known = document.read_text(), files()
    places = (*PLACES, document.parent)
    named = [name for name in PATH.findall(text) if name not in known and not any((at / name).exists() for at in places)]
    assert named == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []
    tests = "\n".join(path.read_text() for name, path in known.items() if name.startswith("test_"))
    assert [name for name in TEST.findall(text) if f"def {name}(" not in tests] == []
