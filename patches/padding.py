"""Padding dropped before the layers and put back after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_fastattn.cache import PagedCache


class Padding:
    """The places of the tokens in a padded batch.

    Args:
        visible: `[B, S]` bool, True where there is a token.
    """

    def __init__(self, visible: Tensor) -> None:
        self.shape = visible.shape
        self.places = visible.flatten().nonzero().squeeze(1)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` to `[1, T, ...]`."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def restore(self, x: Tensor) -> Tensor:
        """`[1, T, ...]` to `[B, S, ...]`, zeros at the padding."""
        full = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return full.index_copy(0, self.places, x[0]).view(*self.shape, *x.shape[2:])

    def restore_outputs(self, outputs: Any) -> Any:
        """The same for the hidden states of a decoder's output, a `ModelOutput` or a tuple."""
        if isinstance(outputs, ModelOutput):
            for name, value in outputs.items():
                if name in ("last_hidden_state", "hidden_states"):
                    outputs[name] = self._restore_any(value)
            return outputs
        return tuple(self._restore_any(value) for value in outputs)

    def _restore_any(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._restore_any(item) for item in value)
        packed = isinstance(value, Tensor) and value.shape[:2] == (1, len(self.places))
        return self.restore(value) if packed else value


def visible_columns(mask: Any, cache: PagedCache, rows: int, columns: int) -> Tensor | None:
    """`[B, past + S]` bool on the host: what the mask shows; None if that is everything.

    Raises:
        ValueError: the mask does not fit, or shows a token that was padding, and so not stored, when it was cached.
    """
    past, stored = cache.get_seq_length(), cache.stored
    if mask is None:
        if stored is not None and not bool(stored.all()):
            raise ValueError(
                f"attention_mask is None, but past_key_values holds padding ({int((~stored).sum())} columns); "
                "pass the mask of all turns, [batch, past + new columns]"
            )
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if tuple(mask.shape) != (rows, past + columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(rows, past + columns)}: {rows} rows, "
            f"{past} columns in the cache and {columns} new ones"
        )
    visible = mask.to("cpu", torch.bool)
    if stored is not None and bool((visible[:, :past] & ~stored).any()):
        raise ValueError(
            "attention_mask shows columns that were padding when they were cached, so their keys are not stored; "
            "keep them masked"
        )
    if bool(visible.all()):
        return None
    return visible
