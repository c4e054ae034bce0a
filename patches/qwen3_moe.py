"""Qwen3-MoE: the attention of Qwen3, experts after it."""

from hf_fastattn.patches.family import Family

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    decoder="Qwen3MoeModel",
    attention="Qwen3MoeAttention",
    qk_norm="Qwen3MoeRMSNorm",
)
