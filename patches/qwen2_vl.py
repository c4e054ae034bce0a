"""Qwen2-VL (Wang et al., 2024), its text decoder: Qwen2 with positions on three axes, combined in cos and sin."""

from hf_fastattn.patches.family import Family

QWEN2_VL = Family(model_type="qwen2_vl_text", decoder="Qwen2VLTextModel", attention="Qwen2VLAttention")
