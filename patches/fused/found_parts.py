"""`FoundParts`: what the forwards of a call found of a decoder's modules, for those that follow.

To look at every module before it is replaced by an operation takes the host a tenth of a step of a small model on a CPU.
In a call between whose forwards no code of the user's runs, one look is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.graphs.seen_modules import look

if TYPE_CHECKING:
    from hf_fastattn.runtime import Runtime

PlainLinear = tuple[Tensor, Tensor | None]


@dataclass
class FoundParts:
    """What was found of the modules of one decoder.

    Attributes:
        decoder: whose they are.
        backend: of its forwards; None until it is known.
        is_walked: its layers are walked through.
        linears: weight and bias of plain linear layers, or what is to be called in the place of one.
        norms: weight and epsilon of plain norms, by module and dtype of what they are given.
    """

    decoder: Any
    backend: str | None = None
    is_walked: bool = False
    linears: dict[Any, PlainLinear | Callable[[Tensor], Any]] = field(default_factory=dict)
    norms: dict[tuple[Any, torch.dtype], tuple[Tensor, float]] = field(default_factory=dict)


def found_parts(decoder: Any, runtime: Runtime, device: torch.device) -> FoundParts:
    """What earlier forwards of the call found; empty where modules may have changed since, or steps may be recorded.

    Args:
        device: of the tokens.
    """
    call = runtime.current
    if call is None or call.users_code or runtime.graphs.records_on(device):
        return FoundParts(decoder)
    if call.found is None:
        # Of a call of one token nothing is read again, and a look takes longer than what is found.
        call.found = FoundParts(decoder)
        return FoundParts(decoder)
    if call.found.decoder is not decoder:
        return FoundParts(decoder)
    if call.is_steady is None:
        # Hooks are code of the user's too.
        call.is_steady = look(decoder).is_sure
    return call.found if call.is_steady else FoundParts(decoder)
