"""`draw_alike`: one rank's random numbers on all ranks that compute a model together, for the length of a call."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.parallel.ranks import Ranks


def digest_of_draws(device: torch.device) -> int:
    """A number for what the generator of a device would draw next."""
    return zlib.crc32(_state_of(device).numpy().tobytes())


def draw_alike(call: Any, ranks: Ranks, device: torch.device) -> None:
    """Have this rank draw what rank 0 does until the call ends; its own numbers then go on behind those it would not draw.

    Args:
        call: `Call` under way.
        device: whose generator is meant.
    """
    own = _state_of(device)
    taken = own.clone().to(device)
    ranks.take_first(taken)
    taken = taken.to("cpu")
    if torch.equal(taken, own):
        return

    def back() -> None:
        _set_state(device, own)
        # The next call is not to draw as this one would have.
        torch.rand(1, device=device)

    call.at_end.append(back)
    _set_state(device, taken)


def _state_of(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
