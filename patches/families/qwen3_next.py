"""Hybrids: Gated DeltaNet (Yang et al., 2025) in three layers of four, gated attention in the fourth."""

from __future__ import annotations

from hf_fastattn.patches.family import Family, like_llama, with_delta, with_experts

FAMILIES = (
    # Qwen3-Next.
    Family(
        model_type="qwen3_next",
        decoder="Qwen3NextModel",
        attention="Qwen3NextAttention",
        layers=with_delta(with_experts("Qwen3Next", rounds_weights=True), "Qwen3Next"),
        blocks=with_experts("Qwen3Next", rounds_weights=True),
        causal_lm="Qwen3NextForCausalLM",
        qk_norm="Qwen3NextRMSNorm",
        unit_offset=True,
        output_gate=True,
        linear_attention=True,
    ),
    # Qwen3.5, its text decoder: positions on three axes, combined in cos and sin.
    Family(
        model_type="qwen3_5_text",
        decoder="Qwen3_5TextModel",
        attention="Qwen3_5Attention",
        layers=with_delta(like_llama("Qwen3_5"), "Qwen3_5"),
        causal_lm=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        axes=True,
        qk_norm="Qwen3_5RMSNorm",
        unit_offset=True,
        output_gate=True,
        linear_attention=True,
    ),
    # Qwen3.5-MoE, its text decoder: experts after the layers.
    Family(
        model_type="qwen3_5_moe_text",
        decoder="Qwen3_5MoeTextModel",
        attention="Qwen3_5MoeAttention",
        layers=with_delta(with_experts("Qwen3_5Moe", rounds_weights=True), "Qwen3_5Moe"),
        blocks=with_experts("Qwen3_5Moe", rounds_weights=True),
        causal_lm=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        axes=True,
        qk_norm="Qwen3_5MoeRMSNorm",
        unit_offset=True,
        output_gate=True,
        linear_attention=True,
    ),
)
