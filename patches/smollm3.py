"""SmolLM3 (Bakouch et al., 2025): Llama without RoPE in one layer of four, windows if the configuration has them."""

from hf_fastattn.patches.family import Family

SMOLLM3 = Family(
    model_type="smollm3",
    decoder="SmolLM3Model",
    attention="SmolLM3Attention",
    rotates=lambda module: bool(module.use_rope),
)
