"""The model under evaluation: loaded once, and lifted to a wider dtype and back for the truth."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

from hf_fastattn.eval.accuracy.random_families import is_random, random_family
from hf_fastattn.eval.choices import MIXTURE as MIXTURE
from hf_fastattn.eval.choices import SHIPPED as SHIPPED

# Fields that a Llama's configuration shares with a Mistral's, beside those that are the same by default.
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@contextmanager
def named(name: str, argument: str = "--model") -> Iterator[None]:
    """What goes wrong in the block is an error of the command's `argument`, which names this model.

    Raises:
        ValueError: the model is nowhere, or can't be loaded, as the first line of Transformers' own error says.
    """
    try:
        _find(name)
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"argument {argument}: {name!r} cannot be loaded: {reason}") from error


def _find(name: str) -> None:
    """Ask the hub once for a model that is not here: loading would ask again and again for a minute."""
    here = is_random(name) or Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if here or constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except EntryNotFoundError:
        return
    except RepositoryNotFoundError as error:
        raise ValueError("it is no folder, and no model of the hub that may be read from here") from error
    except HTTPError as error:
        raise ValueError(f"it is no folder, and the hub cannot be asked: {error}") from error


def check(name: str) -> None:
    """Whether there is such a model, without loading its weights.

    Raises:
        ValueError: there is none.
    """
    with named(name):
        if not is_random(name):
            AutoConfig.from_pretrained(name)


def load(name: str, dtype: torch.dtype, device: str, window: int | None = None) -> tuple[Any, Any]:
    """A model in eval mode on `device`, and its tokenizer.

    Args:
        name: hub id or path, or `random:FAMILY` (see `random_families`).
        dtype: of the weights.
        device: torch's name of it.
        window: load a Llama as a Mistral whose layers see this many keys.

    Raises:
        ValueError: there is no such model, or `window` is given and the model is no Llama.
    """
    with named(name):
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED if is_random(name) else name)
        if is_random(name):
            model = random_family(name, len(tokenizer), dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if window is not None:
        model = as_mistral(model, window)
    # Greedy and endless: whoever generates here says how much, and looks at raw logits.
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id or 0, do_sample=False)
    return model.to(device).eval(), tokenizer


def as_mistral(model: Any, window: int) -> Any:
    """The same weights as a Mistral, which is a Llama with a sliding window of `window` keys in every layer."""
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"--window loads a Llama as a Mistral, but this is a {config.model_type}; leave it out")
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS if hasattr(config, name)}
    mistral = MistralForCausalLM(MistralConfig(**fields, sliding_window=window)).to(model.dtype)
    mistral.load_state_dict(model.state_dict())
    return mistral


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """What counts as exact beside `dtype`: fp64 for fp32, fp32 for 16 bits."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@contextmanager
def in_precision(model: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The model with its parameters widened to `dtype` inside the block, in place, and as before after it.

    Buffers stay: Transformers makes RoPE's angles in fp32 in every dtype, and both models read the same.
    """
    before = model.dtype
    # Their quicker functions have no kernel for it.
    experts = model.get_experts_implementation() if dtype == torch.float64 else None
    norms = [module for module in model.modules() if _is_rms_norm(module)] if dtype == torch.float64 else []
    try:
        # All of them may not fit.
        _cast(model, dtype)
        if experts is not None:
            model.set_experts_implementation("eager")
        for norm in norms:
            # Transformers' norms compute in fp32 whatever the input, which would be the truth's largest error.
            norm.forward = types.MethodType(_exact_rms_norm, norm)
        yield model
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)
        if experts is not None:
            model.set_experts_implementation(experts)
        _cast(model, before)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _is_rms_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and "forward" not in vars(module)


def _exact_rms_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
