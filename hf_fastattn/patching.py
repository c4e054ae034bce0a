"""`patch`, `unpatch`, `patched`: one model made fast, and put back exactly as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_fastattn.batching.hooks import forget_manager
from hf_fastattn.config import FastAttnConfig, resolve_config
from hf_fastattn.generation.hooks import FastGenerationMixin
from hf_fastattn.generation.model_class import fast_class
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.kernels.launch import converts_fp8
from hf_fastattn.kernels.variants.prepared import PreparedVariant
from hf_fastattn.kernels.variants.trace import VariantError
from hf_fastattn.kernels.variants.variant import Variant
from hf_fastattn.layer_variants import LayerVariants, asked_variants
from hf_fastattn.pages.model_layout import is_pageable, is_recurrent, template_layers
from hf_fastattn.parallel.ranks import ranks_of
from hf_fastattn.patches.attention.ahead import compile_ahead_of_calls
from hf_fastattn.patches.attention.forward import ATTENTION_FORWARDS
from hf_fastattn.patches.attention.inside import ModelRotation, needs_rotation
from hf_fastattn.patches.decoder.forward import DECODER_FORWARDS
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.fused.expert_blocks import BLOCK_FORWARDS, is_known_block
from hf_fastattn.patches.fused.experts import why_not_captured
from hf_fastattn.patches.modules.module_state import release_slots, replace_forward
from hf_fastattn.patches.modules.plain_copies import STATE, plain_class, written_class
from hf_fastattn.patches.modules.scope import PatchScope
from hf_fastattn.patches.modules.unchanged import layer_without_our_attention
from hf_fastattn.patches.registry import family_of
from hf_fastattn.runtime import PATIENCE, Runtime
from hf_fastattn.streaming import check_streaming, streaming_variant
from hf_fastattn.transformers_version import is_tested, supported_versions

Model = TypeVar("Model", bound=nn.Module)

WITHOUT_GENERATE = (
    "for encoders, classifiers and sentence-transformers call hf_fastattn.register() and load the model with "
    "attn_implementation='fastattn'"
)


@dataclass(frozen=True)
class PatchState:
    """Attached to a patched model as `_fastattn`."""

    runtime: Runtime
    scope: PatchScope
    family: Family
    modules: tuple[str, ...]
    decoder_name: str

    def decoder(self, model: Any) -> Any:
        """The module that stands where the patched decoder stood."""
        return model.get_submodule(self.decoder_name)

    def plain_slots(self, model: Any) -> dict[str, Any]:
        """Nothing of the model itself but its class and this attribute is replaced."""
        return {}


def patch(model: Model, config: FastAttnConfig | None = None, *, variant: Any = None, **options: Any) -> Model:
    """Make `model.generate()` use paged attention. Other instances and classes are untouched.

    Args:
        model: a Transformers causal language model of a supported family, or a wrapper of one (PEFT).
        config: options; or give single options by keyword (`page_size=32`).
        variant: what attention does besides, a `hf_fastattn.Variant` for all layers, or a function of the layer index that
            gives one or None. It comes on top of the model's own windows, norms and RoPE; `b` is the row of the batch, beams
            and samples counted. Where a call needs Transformers' own attention, which computes no variant, it raises a
            `StockAttentionError`.

    Returns:
        The same object.

    Raises:
        TypeError: not a Transformers model, an unknown option, or `variant` is none.
        ValueError: the model's type or state cannot be patched (the reason is named), an option is out of range, a
            device cannot read `kv_dtype`, the variant cannot be computed here (`VariantError`: which line, and what would
            work), or the model is patched already with other options or another variant. The model is then as before.
    """
    resolved = resolve_config(config, options)
    target = find_model(model)
    if resolved.streaming is not None:
        variant = streaming_variant(variant)
    state = vars(target).get(STATE)
    if isinstance(target, FastGenerationMixin) and state is not None:
        if state.runtime.config != resolved:
            raise ValueError(
                f"the model is patched already, with {state.runtime.config}; unpatch() it before patching with {resolved}"
            )
        if not state.runtime.variants.same_as(asked_variants(variant, _attention_layers(target, state.family))):
            raise ValueError("the model is patched already, with another variant; unpatch() it before patching again")
        return model
    family = family_of(target.config.get_text_config(decoder=True).model_type)
    _check_layers(target, family)
    if resolved.streaming is not None:
        check_streaming(target, family, resolved)
    _check_kv_dtype(target, family, resolved)
    _warn_outside_tested_range()
    scope = PatchScope()
    variants = _prepared(target, family, asked_variants(variant, _attention_layers(target, family)), resolved)
    runtime = Runtime(resolved, target.config, target.dtype, why_not_captured, variants, ranks_of(target))
    try:
        names, decoder = _replace_forwards(target, scope, runtime, family)
        # Not through the scope: scope and model would then refer to each other, a cycle.
        setattr(target, STATE, PatchState(runtime, scope, family, tuple(names), decoder))
        base: Any = type(target)
        scope.set(target, "__class__", fast_class(base))
    except BaseException:
        _take_back(target, scope)
        raise
    if runtime.ranks is not None:
        runtime.ranks.say_patched(True)
    compile_ahead_of_calls(_attentions(target, family), target.dtype, resolved, not variants)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: every attribute is as before. A model that is not patched is left as it is.

    Returns:
        The same object.

    Raises:
        RuntimeError: a `generate()` of the model is under way, in this thread or another. The model stays patched.
    """
    target = find_model(model)
    if isinstance(target, FastGenerationMixin):
        if target._fastattn.runtime.is_calling:
            raise RuntimeError(
                "unpatch() of a model whose generate() is under way would leave that without its pages; call it when "
                "generate() has returned, in every thread"
            )
        forget_manager(target)
        # Not amid the step of another thread's running batch.
        turn = target._fastattn.runtime.turn
        return (turn.take(PATIENCE), _take_back(target, target._fastattn.scope), model)[2]  # type: ignore[func-returns-value]
    return model


def _take_back(model: Any, scope: PatchScope) -> None:
    for module in scope.targets():
        if module is not model and STATE in vars(module):
            release_slots(module)
    scope.undo()
    held = vars(model).get(STATE)
    ranks = None if held is None else held.runtime.ranks
    if ranks is not None:
        ranks.say_patched(False)
        if ranks.heads is not None:
            ranks.heads.drop()
    for module in model.modules() if held is not None else ():
        # The model itself, and shallow copies of patched modules, as accelerate's compile_regions() makes of them.
        if getattr(vars(module).get(STATE), "runtime", None) is held.runtime:
            release_slots(module)
            module.__class__ = plain_class(type(module))
            delattr(module, STATE)


@contextmanager
def patched(model: Model, config: FastAttnConfig | None = None, *, variant: Any = None, **options: Any) -> Iterator[Model]:
    """`patch` for the length of a `with` block. A model that was patched before stays patched."""
    before = isinstance(find_model(model), FastGenerationMixin)
    patch(model, config, variant=variant, **options)
    try:
        yield model
    finally:
        if not before:
            unpatch(model)


def find_model(model: Any) -> Any:
    """The Transformers model that `generate()` belongs to, inside wrappers such as PEFT's.

    Raises:
        TypeError: there is none.
    """
    inner = model
    for _ in range(8):
        if isinstance(inner, PreTrainedModel):
            break
        if hasattr(inner, "get_base_model"):
            unwrapped = inner.get_base_model()
        else:
            # What torch.compile holds, and what parallel wrappers do.
            unwrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if unwrapped is None:
            raise TypeError(
                f"model is a {type(model).__name__}, expected a Transformers model with generate(), or one that PEFT or "
                f"torch.compile wrapped; {WITHOUT_GENERATE}"
            )
        inner = unwrapped
    # Qwen's Omni models speak of what their thinker has generated.
    inner = getattr(inner, "thinker", inner)
    if not hasattr(inner, "generate"):
        raise TypeError(
            f"model is a {type(inner).__name__}, which has no generate(); patch() takes what AutoModelForCausalLM loads; "
            f"{WITHOUT_GENERATE}"
        )
    return inner


def _warn_outside_tested_range() -> None:
    if not is_tested():
        warnings.warn(
            f"hf_fastattn is tested with {supported_versions()}, this is {transformers.__version__}; "
            "compare its outputs with those of the unpatched model",
            stacklevel=3,
        )


def _check_layers(model: Any, family: Family) -> None:
    for index, layer in enumerate(template_layers(model.config)):
        if not is_pageable(layer) and not (family.linear_attention and is_recurrent(layer)):
            raise ValueError(
                f"layer {index} keeps its state in a {type(layer).__name__}, which a {family.model_type} model is not "
                "known to have; full, sliding-window and, in some families, linear attention layers can be patched"
            )


def _check_kv_dtype(model: Any, family: Family, config: FastAttnConfig) -> None:
    """Raise a `ValueError` if keys and values cannot be stored in `config.kv_dtype` where the model is."""
    if config.kv_dtype is None:
        return
    for module in _attentions(model, family):
        device, dim = next(module.parameters()).device, module.head_dim
        backend, _ = choose_backend(config.backend, device, model.dtype, dim, config.batch_invariant)
        if dim % 4:
            raise ValueError(f"kv_dtype={config.kv_dtype!r} takes head dims that are multiples of 4, this model's is {dim}")
        if config.kv_dtype == "fp8" and backend != "reference" and not converts_fp8(device):
            raise ValueError(
                f"kv_dtype='fp8' needs a GPU that converts e4m3, of compute capability 8.9 or more, and {device} is of "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; use kv_dtype='int8'"
            )


def _attentions(model: Any, family: Family) -> list[Any]:
    return [module for module in model.modules() if written_class(type(module)).__name__ == family.attention]


def _attention_layers(model: Any, family: Family) -> list[int]:
    return sorted({module.layer_idx for module in _attentions(model, family)})


def _prepared(model: Any, family: Family, asked: dict[int, Variant], config: FastAttnConfig) -> LayerVariants:
    """The variants that were asked for, each looked at once for the layers that have it in common.

    Raises:
        VariantError: one cannot be computed where the model is.
    """
    made: dict[tuple[int, torch.device, bool], PreparedVariant] = {}
    found, rotations = {}, dict[torch.device, ModelRotation]()
    attentions = _attentions(model, family) if asked else []
    for module in attentions:
        index, dim = module.layer_idx, module.head_dim
        device = next(module.parameters()).device
        if index in asked:
            backend, _ = choose_backend(config.backend, device, model.dtype, dim, config.batch_invariant)
            wanted, turns = asked[index], family.rotates is None or family.rotates(module)
            key = (id(wanted), device, turns)
            if key not in made:
                if needs_rotation(wanted) and turns:
                    if device not in rotations:
                        rotations[device] = _rotation_of(model, family, device, config)
                    used = rotations[device].applied(wanted)
                else:
                    used = wanted if turns else replace(wanted, rope="model")
                heads = module.config.num_attention_heads
                made[key] = PreparedVariant(used, heads, dim, device, backend != "reference", wanted)
            found[index] = made[key]
    layers = _attention_layers(model, family) if asked else []
    inside = bool(layers) and all(index in asked and asked[index].rope == "inside" for index in layers)
    # Rows that keep a part of their tokens never have more.
    return LayerVariants(found, () if config.streaming else tuple(rotations.values()), inside)


def _rotation_of(model: Any, family: Family, device: torch.device, config: FastAttnConfig) -> ModelRotation:
    if config.kv_dtype is not None:
        raise VariantError(
            f"rope='inside' with kv_dtype={config.kv_dtype!r}: the kernels that rotate keys read them as the model gives "
            "them; use one of the two, or give key_transform and query_transform of your own"
        )
    decoder = next(module for module in model.modules() if written_class(type(module)).__name__ == family.decoder)
    if config.streaming is None:
        return ModelRotation(decoder, family, device, 1)
    layout = config.streaming.layout(config.page_size)
    return ModelRotation(decoder, family, device, layout.capacity, layout.step)


def _replace_forwards(model: Any, scope: PatchScope, runtime: Runtime, family: Family) -> tuple[list[str], str]:
    """Patch the decoder, its attention modules and expert blocks; the names of all, and the decoder's."""
    names, decoders = [], []
    for name, module in model.named_modules():
        kind = written_class(type(module)).__name__
        if kind == family.decoder:
            replace_forward(scope, module, DECODER_FORWARDS, runtime, family, name)
            decoders.append(name)
        elif kind == family.attention:
            variant = runtime.variants.by_layer.get(module.layer_idx)
            replace_forward(scope, module, ATTENTION_FORWARDS, runtime, family, name, variant)
        elif is_known_block(module, family):
            replace_forward(scope, module, BLOCK_FORWARDS, runtime, family, name)
        else:
            continue
        names.append(name)
    if len(decoders) != 1:
        raise ValueError(
            f"found {len(decoders)} {family.decoder} modules, expected one; a model whose decoder was replaced "
            "cannot be patched"
        )
    decoder = model.get_submodule(decoders[0])
    other = layer_without_our_attention(decoder)
    if other is not None:
        found = type(getattr(decoder.layers[other], "self_attn", None)).__name__
        raise ValueError(
            f"{decoders[0]}.layers.{other}.self_attn is a {found}, expected a {family.attention}; a model whose attention "
            "was replaced cannot be patched"
        )
    return names, decoders[0]
