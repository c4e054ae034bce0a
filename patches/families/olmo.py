"""Norms behind attention and MLP instead of before them; such layers are not fused."""

from __future__ import annotations

from hf_fastattn.patches.family import Family

FAMILIES = (
    # OLMo 2 (Team OLMo, 2024): RMSNorm over all heads of q and of k at once.
    Family(
        model_type="olmo2",
        decoder="Olmo2Model",
        attention="Olmo2Attention",
        causal_lm="Olmo2ForCausalLM",
        projection_norm=True,
    ),
    # OLMo 3: sliding windows, and RoPE scaled in the layers without one alone.
    Family(
        model_type="olmo3",
        decoder="Olmo3Model",
        attention="Olmo3Attention",
        causal_lm="Olmo3ForCausalLM",
        projection_norm=True,
    ),
    # EXAONE 4.0: RMSNorm on each head of q and k, no RoPE in the full layers between those with windows.
    Family(
        model_type="exaone4",
        decoder="Exaone4Model",
        attention="Exaone4Attention",
        causal_lm="Exaone4ForCausalLM",
        qk_norm="Exaone4RMSNorm",
        rotates=lambda module: module.sliding_window is None or module.is_sliding,
    ),
)
