"""Which model types can be patched, and why others cannot."""

from __future__ import annotations

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.llama import LLAMA
from hf_fastattn.patches.ministral import MINISTRAL
from hf_fastattn.patches.ministral3 import MINISTRAL3
from hf_fastattn.patches.mistral import MISTRAL
from hf_fastattn.patches.mixtral import MIXTRAL
from hf_fastattn.patches.qwen2 import QWEN2
from hf_fastattn.patches.qwen2_5_vl import QWEN2_5_VL
from hf_fastattn.patches.qwen2_moe import QWEN2_MOE
from hf_fastattn.patches.qwen2_vl import QWEN2_VL
from hf_fastattn.patches.qwen3 import QWEN3
from hf_fastattn.patches.qwen3_5 import QWEN3_5
from hf_fastattn.patches.qwen3_5_moe import QWEN3_5_MOE
from hf_fastattn.patches.qwen3_moe import QWEN3_MOE
from hf_fastattn.patches.qwen3_next import QWEN3_NEXT
from hf_fastattn.patches.qwen3_vl import QWEN3_VL
from hf_fastattn.patches.qwen3_vl_moe import QWEN3_VL_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MINISTRAL,
        MINISTRAL3,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN2_5_VL,
        QWEN2_MOE,
        QWEN2_VL,
        QWEN3,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_VL,
        QWEN3_VL_MOE,
    )
}

_LATENT = "it caches latents (multi-head latent attention), not keys and values"
_INDEXED = "an indexer chooses its keys, and pages have no such mask"
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
