"""Qwen1.5-MoE and Qwen2-MoE: the attention of Qwen2 with optional biases, experts after it."""

from hf_fastattn.patches.family import Family

QWEN2_MOE = Family(model_type="qwen2_moe", decoder="Qwen2MoeModel", attention="Qwen2MoeAttention")
