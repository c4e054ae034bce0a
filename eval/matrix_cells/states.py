"""The states a model can be in when it is called: dtype, autocast, what a trainer does to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATES = {
    "autocast": "called under torch.autocast in bf16",
    "accelerate": "its forward wrapped as Accelerator(mixed_precision='bf16').prepare does it",
    "train": "in train mode",
    "checkpointing": "with gradient checkpointing",
    "lora": "with a LoRA adapter",
}


def dtype_of(state: str) -> torch.dtype:
    """The dtype of the weights."""
    return DTYPES[state.split("+")[0]]


def is_exact(state: str) -> bool:
    """Whether everything is computed in fp32."""
    words = state.split("+")
    return words[0] == "fp32" and not {"autocast", "accelerate"} & set(words)


def put(model: Any, state: str) -> Any:
    """The model in this state; what is wrapped around it comes last.

    Raises:
        ImportError: a package that the state needs is not installed.
    """
    words = state.split("+")[1:]
    unknown = [word for word in words if word not in STATES]
    if unknown:
        raise ValueError(f"state {state!r} has unknown words {unknown}; known are {sorted(STATES)}")
    if "checkpointing" in words:
        model.gradient_checkpointing_enable()
    if "lora" in words:
        model = _adapted(model)
    if "train" in words:
        model.train()
    if "accelerate" in words:
        _wrap(model)
    return model


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    # Weights that change the output, as those of an adapter that was trained.
    options = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, options).eval()


def _wrap(model: Any) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model._original_forward = model.forward
    wrapped = torch.autocast(model.device.type, torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(wrapped, model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)


def around(state: str, device: torch.device) -> AbstractContextManager[Any]:
    """What calls run in."""
    if "autocast" in state.split("+"):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def lifted(model: Any, state: str) -> Iterator[None]:
    """All parameters wider inside the block, fp64 for states in fp32, and no wrapper around the forward; then as before."""
    wide = torch.float64 if is_exact(state) else torch.float32
    held = [(parameter, parameter.data) for parameter in model.parameters()]
    wrapped = vars(model).pop("forward", None)
    try:
        for parameter, data in held:
            parameter.data = data.to(wide)
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
        if wrapped is not None:
            model.forward = wrapped
