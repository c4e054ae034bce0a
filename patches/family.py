"""`Family`: what a family file says about a model type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Family:
    """The modules of a model type that are replaced, and how its attention differs from Llama's.

    Biases, LoRA and quantisation need no word here, since projections are called; windows and scales are read from
    the model, and a partial or multi-axis RoPE from its cos and sin.

    Attributes:
        model_type: `model_type` of the text decoder's configuration.
        decoder: class name of the base decoder.
        attention: class name of its attention modules, with `q_proj`, `k_proj`, `v_proj`, `o_proj`.
        qk_norm: class name of the RMSNorm on each head of q and k (`q_norm`, `k_norm`) before RoPE, if there is one.
        unit_offset: that norm multiplies by `1 + weight`.
        output_gate: `q_proj` yields a query and a gate a head; the output is multiplied by `sigmoid(gate)`.
        query_scale: `(config, position_ids [.., S]) -> [.., S]`, a factor on each query after RoPE, if there is one.
        linear_attention: some layers keep a recurrent state, which padding must pass by: the padded layout is kept.
    """

    model_type: str
    decoder: str
    attention: str
    qk_norm: str | None = None
    unit_offset: bool = False
    output_gate: bool = False
    query_scale: Callable[[Any, Tensor], Tensor] | None = None
    linear_attention: bool = False
