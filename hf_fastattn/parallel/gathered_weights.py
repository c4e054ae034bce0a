"""Whether forwards of a model gather its weights from other processes, as under FSDP and DeepSpeed's ZeRO-3.

Each process then has texts of its own, and takes part in the gathers of every forward of the others: one that runs a forward
more, or less, than the others leaves them waiting for ever. Transformers' loop sees to it that all take equally many
(`synced_gpus`), so such a model's forwards have to be Transformers', one for one.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

# Classes that FSDP 2 and FSDP 1 give modules, or put around them.
SHARDED = ("FSDPModule", "FullyShardedDataParallel")
FSDP = "torch.distributed.fsdp"
# Of a parameter under ZeRO-3, which `deepspeed.zero.GatheredParameters` makes whole.
ZERO_STATUS, WHOLE = "ds_status", "AVAILABLE"


def why_counted(model: nn.Module) -> str | None:
    """Why a process may run neither more nor fewer forwards of the model than Transformers would; None if it may."""
    for module in model.modules():
        kind: Any = type(module)
        if is_sharded_kind(kind):
            return f"forwards gather the weights from other processes: a {kind.__name__} is sharded by FSDP"
        for parameter in module._parameters.values():
            status: Any = getattr(parameter, ZERO_STATUS, None)
            if status is not None and getattr(status, "name", "") != WHOLE:
                name = kind.__name__
                return f"forwards gather the weights from other processes: those of a {name} are partitioned by ZeRO-3"
    return None


def unsharded_class(kind: Any) -> Any:
    """The class that FSDP 2 derived `kind` from, which a module had before its weights were sharded; else `kind`."""
    return next((base for base in kind.__mro__ if not is_sharded_kind(base)), kind)


@functools.lru_cache(maxsize=256)
def is_sharded_kind(kind: type) -> bool:
    """Whether modules of this class are FSDP's."""
    return any(base.__name__ in SHARDED and base.__module__.startswith(FSDP) for base in kind.__mro__)
