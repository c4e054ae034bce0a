"""What the tensors take that an object holds on a device, in whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Objects of other packages are not looked into.
OURS = "hf_fastattn."


def held_bytes(held: Any, device: torch.device) -> int:
    """Bytes of all tensors on `device` in attributes, dictionaries and sequences; views of one storage count once."""
    storages: dict[int, int] = {}
    waiting, seen = [held], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.device.type == device.type:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif type(value).__module__.startswith(OURS):
            waiting.extend(getattr(value, "__dict__", {}).values())
    return sum(storages.values())
