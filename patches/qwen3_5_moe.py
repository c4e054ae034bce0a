"""Qwen3.5-MoE, its text decoder: the layers of Qwen3.5, experts after them."""

from hf_fastattn.patches.family import Family

QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    decoder="Qwen3_5MoeTextModel",
    attention="Qwen3_5MoeAttention",
    qk_norm="Qwen3_5MoeRMSNorm",
    unit_offset=True,
    output_gate=True,
    linear_attention=True,
)
