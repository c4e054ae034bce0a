"""In which dtype autocast computes the products of a model's forward: the region around it, or accelerate's wrapper.

accelerate replaces `forward` of a prepared model by one that enters autocast, calls the original, and casts outputs to
fp32 (`Accelerator.prepare_model`). The original stands in `_original_forward`. A PeftModel that was prepared is by-passed
by its own `generate()`, which calls the model inside: that one then runs without autocast, as it does in Transformers.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch.amp.autocast_mode import autocast

from hf_fastattn.wrappers import below_wrappers, is_called_as_ever, is_class_forward


def region_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region that is on; None outside of one."""
    # Offloaded weights are on no device that has regions.
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def forward_dtype(model: Any) -> torch.dtype | None:
    """The dtype in which `model(...)`, called here, computes its products; None if autocast is off in it."""
    region = accelerate_region(model)
    if region is None:
        return region_dtype(model.device)
    return region.fast_dtype if region._enabled and region.device == model.device.type else None


def why_not_forward(model: Any) -> str | None:
    """Why `model.forward` may be more than that of its class and autocast; None if it is not."""
    if not is_called_as_ever(model):
        return f"a {type(model).__name__} is called by a function of its own"
    forward = vars(model).get("forward")
    # accelerate binds it to the instance when it takes its wrapper off.
    if forward is None or is_class_forward(model, below_wrappers(model, forward, model.device)):
        return None
    return None if accelerate_region(model) is not None else f"the forward of the {type(model).__name__} was replaced"


def accelerate_region(model: Any) -> autocast | None:
    """The autocast region in accelerate's wrapper around the forward of the model's class; None if there is none."""
    state = vars(model)
    if "forward" not in state or "_original_forward" not in state:
        return None
    outer = below_wrappers(model, state["forward"], model.device)
    converts = getattr(getattr(outer, "__func__", outer), "__wrapped__", None)
    if getattr(type(converts), "__module__", "") != "accelerate.utils.operations":
        return None
    entered = _closure(getattr(converts, "model_forward", None))
    region, inner = entered.get("autocast_instance"), entered.get("func")
    if inner is None or not isinstance(region, autocast):
        return None
    return region if is_class_forward(model, below_wrappers(model, inner, model.device)) else None


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """A region that computes in `dtype`, or none, without the cache of cast weights: what is recorded outlives that."""
    if dtype is None and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def _closure(function: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
