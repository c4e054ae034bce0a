"""Models whose layers are on several devices, on a machine that has one: a processor goes by two names.

accelerate's hooks send tensors to "cpu" and to "cpu:0", and copy them on the way; to whoever asks hooks where modules
compute, these are two devices.
"""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model
from accelerate.hooks import SequentialHook

from hf_fastattn.transformers_version import CACHE

FIRST, SECOND = "cpu", "cpu:0"


def spread(model: Any, *, cut: int = 1, rotary: bool = True, head: bool = True, gpus: bool = False) -> Any:
    """The model with its layers from `cut` on, and its last norm, on a second device.

    Args:
        rotary: the rotary embedding too, as in accelerate's balanced maps.
        head: `lm_head` too; tied to the embedding, it is on the first device.
        gpus: the devices are two GPUs.
    """
    later = [f"model.layers.{index}" for index in range(cut, len(model.model.layers))] + ["model.norm"]
    later += ["model.rotary_emb"] * rotary + ["lm_head"] * head
    sooner = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(cut))]
    sooner += ["model.rotary_emb"] * (not rotary) + ["lm_head"] * (not head)
    places: tuple[Any, Any] = (0, 1) if gpus else (FIRST, FIRST)
    parts = {**dict.fromkeys(sooner, places[0]), **dict.fromkeys(later, places[1])}
    dispatch_model(model, parts, main_device=places[0], skip_keys=CACHE, force_hooks=True)
    for part in [] if gpus else later:
        for module in model.get_submodule(part).modules():
            hook = vars(module).get("_hf_hook")
            for held in hook.hooks if isinstance(hook, SequentialHook) else [hook] if hook else []:
                held.execution_device = SECOND
    return model
