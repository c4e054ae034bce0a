from __future__ import annotations

from typing import Any


def unknown_reasons(program: dict[str, Any], step: int, fallbacks: dict[str, int]) -> str | None:
    return None
