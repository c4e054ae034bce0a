"""`Expansion`: how `generate()` repeated a batch for samples or beams."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expansion:
    """How `generate()` repeated a batch for samples or beams.

    Attributes:
        copies: of each row, one after the other.
        inputs: by name, as repeated and as they were before, for inputs such as images that are more or fewer than
            rows, and so can't be taken apart again.
    """

    copies: int
    inputs: dict[str, tuple[Any, Any]]


def expansion_of(copies: int, before: dict[str, Any], after: dict[str, Any]) -> Expansion:
    """The expansion by `copies` that made the inputs `after` of those `before`."""
    return Expansion(copies, {name: (after[name], value) for name, value in before.items() if name in after})


def unshared(value: Any) -> Any:
    """A dict of encoder outputs copied so far that the repetition, which works in place, leaves the copy alone."""
    return {name: copy.copy(output) for name, output in value.items()} if isinstance(value, dict) else value
