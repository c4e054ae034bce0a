"""Which rows of a prompt batch are computed: each distinct one once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_fastattn.transformers_version import CACHE

# Inputs that belong to the rows of a prompt; any other one keeps the rows apart.
_ROW_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")
_SHARED_INPUTS = (CACHE, "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")


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


@dataclass(frozen=True)
class PromptRows:
    """The rows to compute.

    Attributes:
        first: their numbers in the batch.
        copies: for each row of the batch, which of `first` it equals.
        others: inputs that belong to no single row, for the rows to compute.
    """

    first: list[int]
    copies: list[int]
    others: dict[str, Any]

    def select(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`model_kwargs` for the rows to compute."""
        selected = {name: self._of_rows(name, value) for name, value in model_kwargs.items()}
        return {**selected, **self.others}

    def _of_rows(self, name: str, value: Any) -> Any:
        if name not in _ROW_INPUTS or not isinstance(value, Tensor) or value.shape[_row_dim(name, value)] == 1:
            return value
        return value.index_select(_row_dim(name, value), torch.tensor(self.first, device=value.device))

    def expand(self, outputs: ModelOutput) -> ModelOutput:
        """The outputs of the rows that were computed, for all rows; what is not by row (losses) stays."""
        rows = torch.tensor(self.copies)

        def expand(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(self.first):
                return value.index_select(0, rows.to(value.device))
            if isinstance(value, tuple):
                return tuple(expand(item) for item in value)
            return value

        for name, value in list(outputs.items()):
            outputs[name] = expand(value)
        return outputs


def distinct_rows(input_ids: Tensor, model_kwargs: dict[str, Any], expansion: Expansion | None) -> PromptRows | None:
    """The rows of a prompt batch that differ; None if all do, or if an input is of a kind that is not known here."""
    count = input_ids.shape[0]
    tensors, others = [input_ids], {}
    for name, value in model_kwargs.items():
        if value is None or name in _SHARED_INPUTS or isinstance(value, bool | int | str):
            continue
        if isinstance(value, dict) and not value:
            continue
        if name in _ROW_INPUTS and isinstance(value, Tensor):
            rows = value.shape[_row_dim(name, value)]
            if rows not in (1, count):
                return None
            if rows == count:
                tensors.append(value.movedim(_row_dim(name, value), 0))
        elif expansion is not None and name in expansion.inputs and value is expansion.inputs[name][0]:
            others[name] = expansion.inputs[name][1]
        else:
            return None
    if others and expansion is not None:
        # What belongs to a row is not known, but that its copies are next to it is.
        if expansion.copies == 1:
            return None
        return PromptRows(list(range(0, count, expansion.copies)), [row // expansion.copies for row in range(count)], others)
    return _equal_rows(tensors)


def expansion_of(copies: int, before: dict[str, Any], after: dict[str, Any]) -> Expansion:
    """The expansion by `copies` that made the inputs `after` of those `before`."""
    return Expansion(copies, {name: (after[name], value) for name, value in before.items() if name in after})


def unshared(value: Any) -> Any:
    """A dict of encoder outputs copied so far that the repetition, which works in place, leaves the copy alone."""
    return {name: copy.copy(output) for name, output in value.items()} if isinstance(value, dict) else value


def _row_dim(name: str, value: Tensor) -> int:
    # Positions on several axes are [axes, B, S]
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def _equal_rows(tensors: list[Tensor]) -> PromptRows | None:
    """Rows that are equal, byte by byte, in all of `tensors`, `[B, ...]` each."""
    count = tensors[0].shape[0]
    first: list[int] = []
    copies: list[int] = []
    kinds: dict[tuple[bytes, ...], int] = {}
    host = [tensor.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy() for tensor in tensors if tensor.numel()]
    for row in range(count):
        key = tuple(rows[row].tobytes() for rows in host)
        if key not in kinds:
            kinds[key] = len(first)
            first.append(row)
        copies.append(kinds[key])
    return PromptRows(first, copies, {}) if len(first) < count else None
