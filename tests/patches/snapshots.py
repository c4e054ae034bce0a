"""A model as it is, attribute by attribute, and what a patch must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tools.models import CORE, assert_fast, padded_batch, real_tokens, tiny

# The core, and what is built differently: a vision tower, a recurrent state.
UNLIKE = (*CORE, "qwen3_vl", "qwen3_next")
Snapshot = dict[str, dict[str, Any]]


def frozen(value: Any) -> Any:
    """`value` by identity; the entries of a dict (submodules, parameters, hooks) each by identity."""
    if isinstance(value, dict):
        return {key: id(entry) for key, entry in value.items()}
    return id(value)


def snapshot(model: torch.nn.Module) -> Snapshot:
    """Class and attributes of every module."""
    modules = dict(model.named_modules())
    attributes = {name: {key: frozen(value) for key, value in vars(module).items()} for name, module in modules.items()}
    for name, module in modules.items():
        attributes[name]["type"] = id(type(module))
    for name in ("config", "generation_config"):
        held = getattr(model, name, None)
        attributes[name] = {"values": repr(held)}
    return attributes


def generate(model: Any, new: int = 16, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**padded_batch(), max_new_tokens=new, do_sample=False, **kwargs)


def assert_patched_equals(stock: Any, model: Any) -> None:
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model, real_tokens(padded_batch()))


def assert_plain(model: Any, family: str) -> None:
    """A model as if it had never been near a patch."""
    stock = tiny(family)
    assert type(model) is type(stock)
    for (name, ours), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert set(vars(ours)) <= set(vars(theirs)) | {"_is_hf_initialized"}, name
    assert torch.equal(generate(model), generate(stock))


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config).eval()


def gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of the loss over the real tokens of the padded batch."""
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.zero_grad()
    model(**batch, labels=labels, **kwargs).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found and all(gradient.isfinite().all() for gradient in found.values())
    return found
