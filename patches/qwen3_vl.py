"""Qwen3-VL, its text decoder: the attention of Qwen3, positions on three interleaved axes combined in cos and sin."""

from hf_fastattn.patches.family import Family

QWEN3_VL = Family(
    model_type="qwen3_vl_text",
    decoder="Qwen3VLTextModel",
    attention="Qwen3VLTextAttention",
    qk_norm="Qwen3VLTextRMSNorm",
)
