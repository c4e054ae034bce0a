"""On which device modules compute: accelerate's hooks send what a module is given to where its weights are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from hf_fastattn.wrappers import align_hooks, device_named

SEVERAL = "the layers are on several devices"


def place_of(module: Any, given: torch.device) -> torch.device:
    """Where calling the module computes, and leaves its output.

    Args:
        given: where what it is given lies.
    """
    if "_hf_hook" not in vars(module):
        return given
    place: torch.device | None = given
    for hook in align_hooks(module):
        # One that sends outputs back leaves no trace of where it computed.
        if hook.execution_device is not None and not hook.io_same_device:
            place = device_named(hook.execution_device)
    if place is None or place == given or place.type != given.type:
        return given
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def placed_submodules(root: nn.Module, given: torch.device) -> Iterator[tuple[nn.Module, torch.device]]:
    """All modules below `root`, each with the device that it computes on: its own hook's, or that of what it is in."""
    stack = [(root, given)]
    while stack:
        parent, place = stack.pop()
        for module in parent._modules.values():
            if module is not None:
                own = place_of(module, place) if "_hf_hook" in vars(module) else place
                stack.append((module, own))
                yield module, own


def is_there(device: torch.device, place: torch.device) -> bool:
    """Whether a tensor on `device` is where modules of `place` compute."""
    return device == place or device.type == "cpu" == place.type


def devices_of(root: nn.Module, given: torch.device) -> tuple[torch.device, ...]:
    """The devices on which modules below `root` with tensors of their own compute."""
    held = placed_submodules(root, given)
    return tuple(dict.fromkeys(place for module, place in held if module._parameters or module._buffers))


def route_of(decoder: Any, lm_head: nn.Module | None, given: torch.device) -> tuple[torch.device, ...]:
    """The devices that hidden states pass through, in order: embedding, layers, last norm, `lm_head` if it is given.

    Args:
        decoder: with the parts that a family's fused layers have.
        given: where tokens lie.
    """
    parts = [decoder.embed_tokens, *islice(decoder.layers, decoder.config.num_hidden_layers), decoder.norm]
    route: list[torch.device] = []
    for part in parts if lm_head is None else [*parts, lm_head]:
        place = place_of(part, route[-1] if route else given)
        if not route or place != route[-1]:
            route.append(place)
    return tuple(route)
