"""Tiny models without a family of ours, on stock's attention and on ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_fastattn.interface import counters
from tests.tools.models import COMMON, WINDOW

# (name of the classes without Config and ForCausalLM, what differs from COMMON, stock's attention)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
        "eager",
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "eager",
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        "eager",
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": WINDOW}, "sdpa"),
    "granite": ("Granite", {"attention_multiplier": 0.3}, "sdpa"),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}, "sdpa"),
    "olmo2": ("Olmo2", {"num_key_value_heads": 1}, "sdpa"),
}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 2},
    "no_cache": {"do_sample": False, "use_cache": False},
}
NEW = 24


def build(name: str, **over: Any) -> Any:
    classes, special, stock = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Of a composite family the text model alone.
        settings = getattr(transformers, f"{classes}TextConfig", None) or getattr(transformers, f"{classes}Config")
        config = settings(**{**COMMON, **special, **over})
        model = getattr(transformers, f"{classes}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(stock)
    return model


def build_pair(name: str, **over: Any) -> tuple[Any, Any]:
    """(stock model, one on our attention) of the same weights."""
    stock = build(name, **over)
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fastattn")
    return stock, model


def tokens(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})


def assert_ours(calls: int | None = None, backend: str = "reference", fallbacks: int = 0) -> None:
    """Our kernels ran `calls` times, and Transformers' attention `fallbacks` times."""
    assert set(counters.kernels) == {backend} and counters.kernels[backend] > 0, counters
    assert sum(counters.fallbacks.values()) == fallbacks, counters
    assert calls is None or counters.kernels[backend] == calls, counters
