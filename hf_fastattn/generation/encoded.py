"""What a tower has made of images, videos or sounds, unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_fastattn.generation.media import Unknown, take

ENCODED = "mm_encoder_outputs"


def encoded_lengths(output: Any) -> list[int]:
    """Tokens of each unit in what a tower has given.

    Raises:
        Unknown: its features are not by unit.
    """
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, list | tuple) and not (isinstance(pooled, Tensor) and pooled.ndim == 3):
        raise Unknown("the tower's features are not by image")
    for layer in getattr(output, "deepstack_features", None) or ():
        if not isinstance(layer, list | tuple) or not all(isinstance(entry, Tensor) for entry in layer):
            raise Unknown("the tower's deepstack features are not by image")
    return [len(entry) for entry in pooled]


def select_encoded(output: Any, units: Sequence[int]) -> Any:
    """A tower's output for these units alone; `encoded_lengths` has to know it."""
    selected = copy.copy(output)
    selected.pooler_output = _pick(output.pooler_output, units)
    if getattr(output, "deepstack_features", None) is not None:
        selected.deepstack_features = [_pick(layer, units) for layer in output.deepstack_features]
    return selected


def _pick(entries: Any, units: Sequence[int]) -> Any:
    return take(entries, units) if isinstance(entries, Tensor) else [entries[unit] for unit in units]
