"""Qwen2.5-Omni (Xu et al., 2025), the text decoder of its thinker: the attention of Qwen2.5-VL."""

from hf_fastattn.patches.family import Family

QWEN2_5_OMNI = Family(
    model_type="qwen2_5_omni_text",
    decoder="Qwen2_5OmniThinkerTextModel",
    attention="Qwen2_5OmniAttention",
)
