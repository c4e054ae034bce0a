"""`Family`: what a family file says about a model type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The modules of a model type that are replaced.

    Attributes:
        model_type: `config.model_type`.
        decoder: class name of the base decoder, whose forward takes `input_ids ... use_cache`.
        attention: class name of its attention modules, with `q_proj`, `k_proj`, `v_proj`, `o_proj`.
    """

    model_type: str
    decoder: str
    attention: str
