"""`Family`: what a family file says about a model type, and which decoder layers are Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MixtureNames:
    """Class names in a mixture of experts: `gate` is the router, `experts` holds the weights of all of them.

    A block with a `shared_expert` adds it, times the sigmoid of `shared_expert_gate`.

    Attributes:
        block: of the layer's `mlp`.
        router: of the router, which scores by softmax.
        experts: of the experts.
        rounds_weights: the router rounds the weights to the dtype of its logits.
    """

    block: str
    router: str
    experts: str
    rounds_weights: bool


@dataclass(frozen=True)
class DeltaNames:
    """Class names of a Gated DeltaNet, `linear_attn` of a layer: of the module, and of the gated RMSNorm in it."""

    module: str
    norm: str


@dataclass(frozen=True)
class LayerNames:
    """Class names in a decoder layer that is Llama's: norm, attention, residual, norm, gated MLP, residual.

    Its modules are named as Llama's (`input_layernorm`, `self_attn`, `post_attention_layernorm`, `mlp` with `gate_proj`,
    `up_proj`, `down_proj`, `act_fn`), and around the layers there is nothing but `embed_tokens`, `rotary_emb` and `norm`.

    Attributes:
        layer: of the layer.
        norm: of its RMSNorms and the decoder's last; "" if they are no RMSNorms, and so are called.
        mlp: of the MLP; "" if it is no gated one, and so is called.
        unit_offset: the norms multiply by `1 + weight`.
        mixture: of a mixture of experts that some layers have for an MLP.
        delta: of a Gated DeltaNet that some layers have for an attention.
    """

    layer: str
    norm: str
    mlp: str
    unit_offset: bool = False
    mixture: MixtureNames | None = None
    delta: DeltaNames | None = None


def like_llama(prefix: str) -> LayerNames:
    """Llama's names, with another prefix than `Llama`."""
    return LayerNames(f"{prefix}DecoderLayer", f"{prefix}RMSNorm", f"{prefix}MLP")


def with_experts(prefix: str, rounds_weights: bool, dense: bool = True) -> LayerNames:
    """The same, with a mixture of experts in some layers, or in all if there are no `dense` ones."""
    names = MixtureNames(f"{prefix}SparseMoeBlock", f"{prefix}TopKRouter", f"{prefix}Experts", rounds_weights)
    layers = like_llama(prefix)
    return replace(layers, mlp=layers.mlp if dense else "", mixture=names)


def with_delta(layers: LayerNames, prefix: str) -> LayerNames:
    """The same, with norms that multiply by `1 + weight`, and a Gated DeltaNet in some layers."""
    names = DeltaNames(f"{prefix}GatedDeltaNet", f"{prefix}RMSNormGated")
    return replace(layers, unit_offset=True, delta=names)


@dataclass(frozen=True)
class Family:
    """The modules of a model type that are replaced, and how its attention differs from Llama's.

    Biases, LoRA and quantisation need no word here, since projections are called; windows and scales are read from
    the model, and a partial or multi-axis RoPE from its cos and sin.

    Attributes:
        model_type: `model_type` of the text decoder's configuration.
        decoder: class name of the base decoder.
        attention: class name of its attention modules, with `q_proj`, `k_proj`, `v_proj`, `o_proj`.
        layers: class names in its decoder layers, if they are known to be Llama's but for the attention; else they are
            called, not fused.
        blocks: class names in decoder layers that are called, if their mixtures of experts run on our kernels all the same.
        causal_lm: classes whose `forward`, given text alone, is the decoder and `lm_head` and nothing else: the device's
            loop runs these.
        qk_norm: class name of the RMSNorm on each head of q and k (`q_norm`, `k_norm`) before RoPE, if there is one.
        unit_offset: that norm multiplies by `1 + weight`.
        projection_norm: `q_norm` and `k_norm` are over all heads at once; they are called.
        rotates: whether an attention module rotates q and k; None if all do.
        output_gate: `q_proj` yields a query and a gate a head; the output is multiplied by `sigmoid(gate)`.
        query_scale: `(config, position_ids [.., S]) -> [.., S]`, a factor on each query after RoPE, if there is one.
        axes: positions are on three axes, which are the same for text; a fourth one in front of them is for masks.
        linear_attention: some layers keep a recurrent state, which padding must pass by: where they are called, the padded
            layout is kept.
    """

    model_type: str
    decoder: str
    attention: str
    layers: LayerNames | None = None
    blocks: LayerNames | None = None
    causal_lm: str | tuple[str, ...] = ()
    qk_norm: str | None = None
    unit_offset: bool = False
    projection_norm: bool = False
    rotates: Callable[[Any], bool] | None = None
    output_gate: bool = False
    query_scale: Callable[[Any, Tensor], Tensor] | None = None
    axes: bool = False
    linear_attention: bool = False
