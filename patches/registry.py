"""Which model types can be patched, and why others cannot."""

from __future__ import annotations

from hf_fastattn.patches.apertus import APERTUS
from hf_fastattn.patches.arcee import ARCEE
from hf_fastattn.patches.cwm import CWM
from hf_fastattn.patches.exaone import EXAONE
from hf_fastattn.patches.exaone4 import EXAONE4
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.granite import GRANITE
from hf_fastattn.patches.hyperclovax import HYPERCLOVAX
from hf_fastattn.patches.jais2 import JAIS2
from hf_fastattn.patches.llama import LLAMA
from hf_fastattn.patches.ministral import MINISTRAL
from hf_fastattn.patches.ministral3 import MINISTRAL3
from hf_fastattn.patches.mistral import MISTRAL
from hf_fastattn.patches.mixtral import MIXTRAL
from hf_fastattn.patches.olmo2 import OLMO2
from hf_fastattn.patches.olmo3 import OLMO3
from hf_fastattn.patches.qwen2 import QWEN2
from hf_fastattn.patches.qwen2_5_omni import QWEN2_5_OMNI
from hf_fastattn.patches.qwen2_5_vl import QWEN2_5_VL
from hf_fastattn.patches.qwen2_moe import QWEN2_MOE
from hf_fastattn.patches.qwen2_vl import QWEN2_VL
from hf_fastattn.patches.qwen3 import QWEN3
from hf_fastattn.patches.qwen3_5 import QWEN3_5
from hf_fastattn.patches.qwen3_5_moe import QWEN3_5_MOE
from hf_fastattn.patches.qwen3_moe import QWEN3_MOE
from hf_fastattn.patches.qwen3_next import QWEN3_NEXT
from hf_fastattn.patches.qwen3_omni_moe import QWEN3_OMNI_MOE
from hf_fastattn.patches.qwen3_vl import QWEN3_VL
from hf_fastattn.patches.qwen3_vl_moe import QWEN3_VL_MOE
from hf_fastattn.patches.seed_oss import SEED_OSS
from hf_fastattn.patches.smollm3 import SMOLLM3
from hf_fastattn.patches.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        APERTUS,
        ARCEE,
        CWM,
        EXAONE,
        EXAONE4,
        GRANITE,
        HYPERCLOVAX,
        JAIS2,
        LLAMA,
        MINISTRAL,
        MINISTRAL3,
        MISTRAL,
        MIXTRAL,
        OLMO2,
        OLMO3,
        QWEN2,
        QWEN2_5_OMNI,
        QWEN2_5_VL,
        QWEN2_MOE,
        QWEN2_VL,
        QWEN3,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_OMNI_MOE,
        QWEN3_VL,
        QWEN3_VL_MOE,
        SEED_OSS,
        SMOLLM3,
        STARCODER2,
    )
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
