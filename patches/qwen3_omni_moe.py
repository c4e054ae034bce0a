"""Qwen3-Omni-MoE (Xu et al., 2025), the text decoder of its thinker: the layers of Qwen3-VL-MoE."""

from hf_fastattn.patches.family import Family

QWEN3_OMNI_MOE = Family(
    model_type="qwen3_omni_moe_text",
    decoder="Qwen3OmniMoeThinkerTextModel",
    attention="Qwen3OmniMoeThinkerTextAttention",
    qk_norm="Qwen3OmniMoeThinkerTextRMSNorm",
)
