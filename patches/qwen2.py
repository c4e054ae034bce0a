"""Qwen2 and Qwen2.5 (Yang et al., 2024): biases on q, k and v, and a sliding window in the layers that the
configuration names."""

from hf_fastattn.patches.family import Family

QWEN2 = Family(model_type="qwen2", decoder="Qwen2Model", attention="Qwen2Attention")
