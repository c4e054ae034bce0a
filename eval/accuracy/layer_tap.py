"""`LayerTap`: the hidden states after each decoder layer, of a stock or a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.patches.modules.watched import takes_packed_rows
from hf_fastattn.patching import find_model


class LayerTap:
    """Hooks on the decoder layers, for the length of a `with` block.

    Args:
        model: stock or patched.
    """

    def __init__(self, model: Any) -> None:
        self._layers = list(find_model(model).get_decoder().layers)
        self._states: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> LayerTap:
        self._handles = [layer.register_forward_hook(self._keep) for layer in self._layers]
        return self

    def __exit__(self, *reason: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @takes_packed_rows
    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def take(self, mask: Tensor) -> Tensor:
        """The states of the last forward, `[layers, B, S, hidden]`; zeros where nothing is shown.

        Args:
            mask: `[B, S]` bool, the tokens of that forward. A patched model may have packed them.
        """
        states, self._states = self._states, []
        assert len(states) == len(self._layers), "one forward a take"
        return torch.stack([_unpacked(state, mask.to(state.device)) for state in states])


def _unpacked(state: Tensor, mask: Tensor) -> Tensor:
    if state.shape[:2] == mask.shape:
        return state * mask[..., None]
    full = state.new_zeros(*mask.shape, state.shape[-1])
    full[mask] = state[0]
    return full
