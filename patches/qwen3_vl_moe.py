"""Qwen3-VL-MoE, its text decoder: the attention of Qwen3-VL, experts after it."""

from hf_fastattn.patches.family import Family

QWEN3_VL_MOE = Family(
    model_type="qwen3_vl_moe_text",
    decoder="Qwen3VLMoeTextModel",
    attention="Qwen3VLMoeTextAttention",
    qk_norm="Qwen3VLMoeTextRMSNorm",
)
