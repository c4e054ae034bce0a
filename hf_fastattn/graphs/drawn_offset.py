"""Where dropout in recorded forwards leaves CUDA's generator: the same seed gives the same draws, recorded anew or not.

Steps are launched ahead, and those past the end of a call draw too. How many there are depends on timing, and whatever a
training step draws next must not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

# By which a step moves the generator on: more than the dropouts of a step of thousands of rows take of it.
A_STEP = 1 << 16


@contextlib.contextmanager
def settled_offset(device: torch.device, steps: Callable[[], int]) -> Iterator[None]:
    """If steps inside draw from the generator of a CUDA device, it ends where that many steps end.

    Args:
        device: of the model.
        steps: asked for at the end.
    """
    generator = generator_of(device)
    before = None if generator is None else generator.get_offset()
    try:
        yield
    finally:
        if generator is not None and before is not None and generator.get_offset() != before:
            generator.set_offset(before + A_STEP * steps())


@contextlib.contextmanager
def unmoved_offset(device: torch.device) -> Iterator[None]:
    """What is drawn inside, from the generator of a CUDA device, is drawn again later."""
    generator = generator_of(device)
    before = 0 if generator is None else generator.get_offset()
    try:
        yield
    finally:
        if generator is not None:
            generator.set_offset(before)


def generator_of(device: torch.device) -> torch.Generator | None:
    """The generator that dropout on the device draws from; None on a CPU, where nothing is launched ahead."""
    if device.type != "cuda":
        return None
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
