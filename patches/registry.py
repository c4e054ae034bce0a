"""Which model types can be patched, and why others cannot."""

from __future__ import annotations

from hf_fastattn.patches.families import llama, mistral, olmo, qwen2, qwen3, qwen3_next
from hf_fastattn.patches.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for lineage in (llama, mistral, olmo, qwen2, qwen3, qwen3_next) for family in lineage.FAMILIES
}

_LATENT = "it caches latents (multi-head latent attention), not keys and values"
_INDEXED = "an indexer chooses its keys, and pages have no such mask"
_CROSS = "its cross-attention layers cache the keys of images, whose number differs from that of the tokens"
_CHUNKED = "its chunked attention lives in the mask alone, and its RoPE rotates neighbouring dimensions"
REFUSALS: dict[str, str] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "llama4": _CHUNKED,
    "llama4_text": _CHUNKED,
    "mistral4": _LATENT,
    "mistral_large4": _LATENT,
    "mistral_large4_text": _LATENT,
    "mllama": _CROSS,
    "mllama_text_model": _CROSS,
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
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
