"""Documents to evaluate on: the shipped held-out text, a local file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_fastattn.eval.checkpoint.recall import heldout_documents

# Short names: data set, configuration, split, and whether to stream instead of downloading it all.
KNOWN = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
    "c4": ("allenai/c4", "en", "validation", True),
}


@dataclass(frozen=True)
class Document:
    """One text, and what to call it."""

    name: str
    text: str


def documents(
    source: str = "heldout",
    *,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    limit: int = 512,
) -> list[Document]:
    """At most `limit` documents, in the order of the source.

    Args:
        source: `heldout` (shipped), the path of a `.txt`, `.json` or `.jsonl` file, `wikitext`, `c4`, or any data set
            that `datasets.load_dataset` finds.
        config: configuration of a data set; `split` and `column` likewise.

    Raises:
        ImportError: a data set is asked for and `datasets` is not installed; names the extra.
        ValueError: the source is no file and no data set, or holds no text.
    """
    found = list(islice(_read(source, config, split, column), limit))
    if not found:
        raise ValueError(f"{source!r} holds no text in column {column!r}")
    return found


def _read(source: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    if source == "heldout":
        return (Document(entry["source"], entry["text"]) for entry in heldout_documents())
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, column)
    if path.suffix in (".txt", ".json", ".jsonl"):
        raise ValueError(f"there is no file {source!r}")
    return _read_data_set(source, config, split, column)


def _read_file(path: Path, column: str) -> Iterator[Document]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        entries = json.loads(text)
    else:
        entries = [{column: text}]
    for number, entry in enumerate(entries):
        body = entry if isinstance(entry, str) else _column(entry, column)
        if body.strip():
            yield Document(f"{path.name}/{number}", body)


def _read_data_set(source: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    name, known_config, known_split, stream = KNOWN.get(source, (source, None, split, False))
    rows: Any = load_dataset(name, config or known_config, split=known_split, streaming=stream)
    texts: Iterator[str] = (_column(row, column) for row in rows)
    if name == "Salesforce/wikitext":
        texts = articles(texts)
    for number, text in enumerate(texts):
        if text.strip():
            yield Document(f"{source}/{number}", text)


def _column(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"the data has no column {column!r}, only {sorted(row)}; name one with --column")
    return row[column]


def load_dataset(name: str, config: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`, with an error that says what to install.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such data set, or it cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data set {name!r} needs `datasets`: pip install 'hf-fastattn[eval]'") from error
    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:
        known = ", ".join(("heldout", *KNOWN))
        raise ValueError(
            f"data set {name!r} cannot be loaded ({type(error).__name__}: {error}); give {known}, another data set of "
            "the hub, or the path of a .txt, .json or .jsonl file"
        ) from error


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText, whose rows are lines: each begins at a heading ` = Title = ` of the first level."""
    held: list[str] = []
    for line in lines:
        bare = line.strip()
        is_title = bare.startswith("= ") and bare.endswith(" =") and not bare.startswith("= =")
        if is_title and held:
            yield "".join(held)
            held = []
        held.append(line)
    yield "".join(held)
