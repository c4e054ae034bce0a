"""Qwen3 (Yang et al., 2025): RMSNorm on each head of q and k before RoPE, no biases by default."""

from hf_fastattn.patches.family import Family

QWEN3 = Family(
    model_type="qwen3",
    decoder="Qwen3Model",
    attention="Qwen3Attention",
    qk_norm="Qwen3RMSNorm",
)
