"""Qwen3: RMSNorm on each head of q and k before RoPE, no biases by default."""

from __future__ import annotations

from hf_fastattn.patches.family import Family, LayerNames, like_llama, with_experts

FAMILIES = (
    # Qwen3 (Yang et al., 2025).
    Family(
        model_type="qwen3",
        decoder="Qwen3Model",
        attention="Qwen3Attention",
        layers=like_llama("Qwen3"),
        causal_lm="Qwen3ForCausalLM",
        qk_norm="Qwen3RMSNorm",
    ),
    # Qwen3-MoE: experts after the attention.
    Family(
        model_type="qwen3_moe",
        decoder="Qwen3MoeModel",
        attention="Qwen3MoeAttention",
        layers=with_experts("Qwen3Moe", rounds_weights=True),
        causal_lm="Qwen3MoeForCausalLM",
        qk_norm="Qwen3MoeRMSNorm",
    ),
    # Qwen3-VL, its text decoder: positions on three interleaved axes, combined in cos and sin.
    Family(
        model_type="qwen3_vl_text",
        decoder="Qwen3VLTextModel",
        attention="Qwen3VLTextAttention",
        layers=LayerNames("Qwen3VLTextDecoderLayer", "Qwen3VLTextRMSNorm", "Qwen3VLTextMLP"),
        causal_lm="Qwen3VLForConditionalGeneration",
        axes=True,
        qk_norm="Qwen3VLTextRMSNorm",
    ),
    # Qwen3-VL-MoE, its text decoder: the attention of Qwen3-VL, experts after it.
    Family(
        model_type="qwen3_vl_moe_text",
        decoder="Qwen3VLMoeTextModel",
        attention="Qwen3VLMoeTextAttention",
        qk_norm="Qwen3VLMoeTextRMSNorm",
    ),
    # Qwen3-Omni-MoE (Xu et al., 2025), the text decoder of its thinker: the layers of Qwen3-VL-MoE.
    Family(
        model_type="qwen3_omni_moe_text",
        decoder="Qwen3OmniMoeThinkerTextModel",
        attention="Qwen3OmniMoeThinkerTextAttention",
        qk_norm="Qwen3OmniMoeThinkerTextRMSNorm",
    ),
)
