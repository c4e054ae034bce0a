"""Which model types can be patched, and why others cannot."""

from __future__ import annotations

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.llama import LLAMA
from hf_fastattn.patches.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2)}

_LATENT = "it caches latents (multi-head latent attention), not keys and values"
REFUSALS: dict[str, str] = {
    "mistral4": _LATENT,
    "mistral_large4": _LATENT,
    "deepseek_v3": _LATENT,
    "qwen4_exp": "an indexer chooses its keys, and pages have no such mask",
    "llama4": "its chunked attention lives in the mask alone",
    "llama4_text": "its chunked attention lives in the mask alone",
}


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        ValueError: none is registered; says why, if there is a known reason.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSALS.get(model_type, "no family file describes it")
    raise ValueError(f"model_type={model_type!r} cannot be patched: {reason}; supported: {sorted(FAMILIES)}")
