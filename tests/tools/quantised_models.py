"""Tiny models whose projections have quantised weights, made by the libraries themselves; without these tests skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tools.models import tiny

# Rows of weights are of whole blocks.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.1}
FOUR_BITS = ("nf4", "nf4 flat", "fp4")


def quantised(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **over: Any) -> Any:
    """A Llama with weights of a kind: those of bitsandbytes by their type or `LLM.int8`, `int8` and `int4` of torchao."""
    model = tiny("llama", **{**SIZES, **over}).to(dtype)
    if kind in ("int8", "int4"):
        return _by_torchao(model.to(device), kind)
    bnb = pytest.importorskip("bitsandbytes")
    name, _, flat = kind.partition(" ")
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for child, linear in list(block.named_children()):
                if type(linear) is nn.Linear:
                    made = _eight_bits(bnb, linear) if kind == "LLM.int8" else _four_bits(bnb, linear, name, not flat, dtype)
                    setattr(block, child, made)
    return model.to(device)


def _four_bits(bnb: Any, linear: nn.Linear, kind: str, nested: bool, dtype: torch.dtype) -> nn.Module:
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, nested, kind, device="meta"
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind, module=new
    )
    new.bias = linear.bias
    return new.eval()


def _eight_bits(bnb: Any, linear: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.eval()


def _by_torchao(model: Any, kind: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = (
        quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        if kind == "int8"
        else quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    )
    quantization.quantize_(model.model, config)
    return model
