"""PEFT adapters of every kind around a tiny model."""

from __future__ import annotations

from typing import Any

import torch

PROJECTIONS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def wrap(model: Any, kind: str) -> Any:
    """`model` with an adapter of one of `draw.ADAPTERS`; the same kind gives the same weights."""
    import peft

    task = {"task_type": "CAUSAL_LM"}
    lora = peft.LoraConfig(r=2, target_modules=PROJECTIONS[:3], init_lora_weights=False, **task)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind.startswith("lora"):
            made: Any = peft.get_peft_model(model, lora)
            if kind in ("lora_two", "lora_names"):
                made.add_adapter("other", lora)
                made.set_adapter("other")
            if kind == "lora_merged":
                made.merge_adapter()
        elif kind == "ia3":
            config = peft.IA3Config(target_modules=PROJECTIONS[1:], feedforward_modules=["down_proj"], **task)
            made = peft.get_peft_model(model, config)
            for name, parameter in made.named_parameters():
                if "ia3" in name:
                    parameter.data.mul_(1.2)
        elif kind == "prefix":
            made = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, **task))
        else:
            made = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, **task))
    return made.to(model.dtype).eval()
