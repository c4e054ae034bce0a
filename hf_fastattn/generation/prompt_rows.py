"""Which rows of a prompt batch are computed: each distinct one once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_fastattn.expansion import Expansion
from hf_fastattn.generation.encoded import ENCODED, encoded_lengths, select_encoded
from hf_fastattn.generation.equal_rows import numbers_of_keys, numbers_of_rows
from hf_fastattn.generation.media import INPUTS, MODALITIES, Unknown, media_of, owners, placeholders, repeats_whole
from hf_fastattn.transformers_version import CACHE

# Inputs that belong to the rows of a prompt; any other one keeps the rows apart.
_ROW_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")
_SHARED_INPUTS = (CACHE, "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")


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

    def expand(self, outputs: Any) -> Any:
        """The outputs of the rows that were computed, for all rows; what is not by row (losses) stays.

        Args:
            outputs: a `ModelOutput`, or a tuple of its values.
        """
        rows = torch.tensor(self.copies, device="cpu")

        def expand(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(self.first):
                return value.index_select(0, rows.to(value.device, non_blocking=True))
            if isinstance(value, tuple):
                return tuple(expand(item) for item in value)
            return value

        if not isinstance(outputs, ModelOutput):
            return expand(outputs)
        for name, value in list(outputs.items()):
            outputs[name] = expand(value)
        return outputs


def distinct_rows(
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    expansion: Expansion | None,
    config: Any = None,
    encoded_from: dict[str, Any] | None = None,
) -> PromptRows | str | None:
    """The rows of a prompt batch that differ; None if all do, or why they cannot be told apart.

    Args:
        config: of the model, which names the tokens that stand for images and the like.
        encoded_from: the inputs of the towers that ran before, for what `model_kwargs` has of their outputs.
    """
    count = input_ids.shape[0]
    if count == 1:
        return None
    repeated = expansion is not None and expansion.copies > 1
    tensors, others, media = [input_ids], {}, {}
    for name, value in model_kwargs.items():
        if value is None or name in _SHARED_INPUTS or isinstance(value, bool | int | str):
            continue
        if isinstance(value, dict) and not value:
            continue
        if name in _ROW_INPUTS and isinstance(value, Tensor):
            rows = value.shape[_row_dim(name, value)]
            if rows not in (1, count):
                return f"{name} is for {rows} rows, there are {count}"
            if rows == count:
                tensors.append(value.movedim(_row_dim(name, value), 0))
        elif repeated and expansion is not None and name in expansion.inputs and value is expansion.inputs[name][0]:
            others[name] = expansion.inputs[name][1]
        elif not repeated and (name in INPUTS or name == ENCODED):
            media[name] = value
        else:
            return f"{name} is not known to belong to a row"
    for known in MODALITIES.values():
        if known.main in others and known.grid in others and not repeats_whole(known, others, model_kwargs):
            # Transformers before 5.23 does so for Qwen's thinkers; we compute what it does, right or wrong.
            return f"{known.main} was repeated patch by patch"
    if others and expansion is not None:
        # Which inputs belong to a row is unknown, but copies of a row stand next to it.
        return PromptRows(list(range(0, count, expansion.copies)), [row // expansion.copies for row in range(count)], others)
    found = _computed_once(numbers_of_rows(tensors))
    if found is None or not media:
        return found
    try:
        return _with_media(found.copies, input_ids, media, {**(encoded_from or {}), **media}, config)
    except Unknown as reason:
        return str(reason)


def _row_dim(name: str, value: Tensor) -> int:
    # Positions on several axes are [axes, B, S]
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def _with_media(
    texts: list[int], input_ids: Tensor, media: dict[str, Any], given: dict[str, Any], config: Any
) -> PromptRows | None:
    """The rows that differ in their texts, numbered by `texts`, or in their images and the like.

    Args:
        media: those of the forward's inputs that go with them.
        given: these, and what the towers were given before.
    """
    keys: list[tuple[Any, ...]] = [(text,) for text in texts]
    encoded, held, units = media.get(ENCODED) or {}, [], {}
    for modality in MODALITIES:
        lengths = None
        if encoded.get(modality) is not None:
            lengths = encoded_lengths(encoded[modality])
            units[modality] = owners(modality, placeholders(modality, input_ids, config), lengths)
        found = media_of(modality, given, input_ids, config, lengths)
        if found is None and lengths is not None:
            raise Unknown(f"the {modality}s were encoded before, and are not there to compare")
        if found is not None:
            held.append(found)
            keys = [(*key, kinds) for key, kinds in zip(keys, found.kinds(), strict=True)]
    lost = [name for name in media if name != ENCODED and not any(name in found.inputs for found in held)]
    if lost:
        raise Unknown(f"{lost} belong to no images, videos or sounds that are given")
    rows = _computed_once(numbers_of_keys(keys))
    if rows is None:
        return None
    others: dict[str, Any] = {}
    for found in held:
        others.update((name, value) for name, value in found.select(rows.first).items() if name in media)
    if encoded:
        chosen = {name: [unit for row in rows.first for unit in owned[row]] for name, owned in units.items()}
        others[ENCODED] = {name: select_encoded(encoded[name], entries) for name, entries in chosen.items()}
    return PromptRows(rows.first, rows.copies, others)


def _computed_once(copies: list[int]) -> PromptRows | None:
    """The first of the rows with each number; None if all are different."""
    first = [copies.index(number) for number in range(max(copies) + 1)]
    return PromptRows(first, copies, {}) if len(first) < len(copies) else None
