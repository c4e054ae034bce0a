"""Qwen2: biases on q, k and v, and a sliding window in the layers that the configuration names."""

from __future__ import annotations

from hf_fastattn.patches.family import Family, LayerNames, like_llama, with_experts

FAMILIES = (
    # Qwen2 and Qwen2.5 (Yang et al., 2024).
    Family(
        model_type="qwen2",
        decoder="Qwen2Model",
        attention="Qwen2Attention",
        layers=like_llama("Qwen2"),
        causal_lm="Qwen2ForCausalLM",
    ),
    # Qwen1.5-MoE and Qwen2-MoE: optional biases, experts after the attention.
    Family(
        model_type="qwen2_moe",
        decoder="Qwen2MoeModel",
        attention="Qwen2MoeAttention",
        layers=with_experts("Qwen2Moe", rounds_weights=True),
        causal_lm="Qwen2MoeForCausalLM",
    ),
    # Qwen2-VL (Wang et al., 2024), its text decoder: positions on three axes, combined in cos and sin.
    Family(
        model_type="qwen2_vl_text",
        decoder="Qwen2VLTextModel",
        attention="Qwen2VLAttention",
        layers=LayerNames("Qwen2VLDecoderLayer", "Qwen2VLRMSNorm", "Qwen2MLP"),
        causal_lm="Qwen2VLForConditionalGeneration",
        axes=True,
    ),
    # Qwen2.5-VL (Bai et al., 2025), its text decoder: the attention of Qwen2-VL.
    Family(
        model_type="qwen2_5_vl_text",
        decoder="Qwen2_5_VLTextModel",
        attention="Qwen2_5_VLAttention",
        layers=LayerNames("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLRMSNorm", "Qwen2MLP"),
        causal_lm="Qwen2_5_VLForConditionalGeneration",
        axes=True,
    ),
    # Qwen2.5-Omni (Xu et al., 2025), the text decoder of its thinker: the attention of Qwen2.5-VL.
    Family(
        model_type="qwen2_5_omni_text",
        decoder="Qwen2_5OmniThinkerTextModel",
        attention="Qwen2_5OmniAttention",
    ),
)
