"""`Journal`: finished parts of an evaluation, one JSON line each, so that a rerun goes on where the last one stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Records by key, kept in a file named after the settings.

    Args:
        path: the file; None keeps the records in memory only.
        settings: what the records depend on; a file of other settings is not read, since its name differs.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self._records: dict[str, Any] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self._read(path)
        else:
            path.write_text(json.dumps({"settings": settings}, default=str) + "\n")

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        # A run that was killed may have left half a line, which ends without a newline.
        if lines[-1]:
            path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        for line in lines[1:-1]:
            entry = json.loads(line)
            self._records[entry["key"]] = entry["record"]

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Any:
        return self._records[key]

    def add(self, key: str, record: Any) -> None:
        """Keep a record; it is on disk when this returns."""
        # What a later run reads back is what this one goes on with.
        self._records[key] = json.loads(json.dumps(record))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")
