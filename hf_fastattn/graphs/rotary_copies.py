"""`RotaryCopies`: RoPE tables made on each device of a model that has its rotary embedding on one of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.graphs.placement import place_of
from hf_fastattn.wrappers import runs_class_forward

# What hooks and wrappers around a module's forward are known by.
WRAPPERS = ("forward", "_old_forward", "_hf_hook")


class RotaryCopies:
    """Modules that compute as a rotary embedding does, over buffers of their own; live with the model."""

    def __init__(self) -> None:
        self._held: dict[torch.device, tuple[Any, Any]] = {}

    def tables(self, rotary: Any, states: Tensor, position_ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin for layers on `device`, where `states` and `position_ids` are; to the bit those of `rotary`."""
        home = place_of(rotary, device)
        if home == device:
            cos, sin = rotary(states, position_ids=position_ids)
            return cos, sin
        if not runs_class_forward(rotary, home):
            cos, sin = rotary(states, position_ids=position_ids)
            return cos.to(states.device, non_blocking=True), sin.to(states.device, non_blocking=True)
        held = self._on(rotary, states.device, device)
        # A recorded forward holds no copies between devices; its caller has this done before each call.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _follow(rotary, held)
        cos, sin = held(states, position_ids=position_ids)
        return cos, sin

    def refresh(self) -> None:
        """Read the buffers anew, which the user may have written to."""
        for rotary, held in self._held.values():
            _follow(rotary, held)

    def _on(self, rotary: Any, device: torch.device, place: torch.device) -> Any:
        known = self._held.get(place)
        if known is not None and known[0] is rotary and _are_alike(rotary._buffers, known[1]._buffers):
            return known[1]
        made = copy.copy(rotary)
        for name in WRAPPERS:
            vars(made).pop(name, None)
        # A tensor made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            made._buffers = {
                name: None if buffer is None else buffer.to(device, copy=True) for name, buffer in rotary._buffers.items()
            }
        self._held[place] = (rotary, made)
        return made


def _follow(rotary: Any, held: Any) -> None:
    with torch.no_grad():
        for name, buffer in rotary._buffers.items():
            if buffer is not None:
                held._buffers[name].copy_(buffer, non_blocking=True)


def _are_alike(given: dict[str, Tensor | None], held: dict[str, Tensor | None]) -> bool:
    def look(buffers: dict[str, Tensor | None]) -> Any:
        return [(name, buffer is None or (buffer.shape, buffer.dtype)) for name, buffer in buffers.items()]

    return bool(look(given) == look(held))
