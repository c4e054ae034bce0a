"""Qwen2.5-VL (Bai et al., 2025), its text decoder: the attention of Qwen2-VL."""

from hf_fastattn.patches.family import Family

QWEN2_5_VL = Family(model_type="qwen2_5_vl_text", decoder="Qwen2_5_VLTextModel", attention="Qwen2_5_VLAttention")
