"""Qwen3.5, its text decoder: the layers of Qwen3-Next, positions on three axes combined in cos and sin."""

from hf_fastattn.patches.family import Family

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    decoder="Qwen3_5TextModel",
    attention="Qwen3_5Attention",
    qk_norm="Qwen3_5RMSNorm",
    unit_offset=True,
    output_gate=True,
    linear_attention=True,
)
