"""`Padding`: the tokens of a padded batch taken out of it, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_fastattn.cache.tables_source import TablesSource


class Padding:
    """The places of the tokens in a padded batch.

    Args:
        visible: `[B, S]` bool on the host, True where there is a token.
        device: of what will be packed.
    """

    def __init__(self, visible: Tensor, device: torch.device) -> None:
        self.visible = visible
        self.shape = visible.shape
        # Found on the host: the device need not be waited for.
        self.places = visible.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        self._rope: tuple[TablesSource, tuple[Tensor, Tensor]] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` to `[1, T, ...]`."""
        return x.flatten(0, 1).index_select(0, self.places.to(x.device))[None]

    def pack_positions(self, x: Tensor) -> Tensor:
        """`[1 or B, S]` to `[1, T]`, or those of several axes `[axes, 1 or B, S]` to `[axes, 1, T]`."""
        x = x.expand(*x.shape[:-2], *self.shape)
        return x.flatten(-2).index_select(-1, self.places.to(x.device)).unsqueeze(-2)

    def pack_rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[1 or B, S, rotary dims]` to `[1, T, rotary dims]`, once for all layers."""
        if self._rope is None or not self._rope[0].is_still(cos, sin):
            rows = self.shape[0]
            packed = self.pack(cos.expand(rows, -1, -1)), self.pack(sin.expand(rows, -1, -1))
            self._rope = (TablesSource(cos, sin), packed)
        return self._rope[1]

    def restore(self, x: Tensor) -> Tensor:
        """`[1, T, ...]` to `[B, S, ...]`, zeros at the padding."""
        full = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return full.index_copy(0, self.places.to(x.device), x[0]).view(*self.shape, *x.shape[2:])

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
