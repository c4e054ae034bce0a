"""Llama, and what differs from it in norms, MLP, RoPE or factors alone."""

from __future__ import annotations

from hf_fastattn.patches.family import Family, LayerNames, like_llama

FAMILIES = (
    # Llama (Touvron et al., 2023): grouped-query attention, rotate-half RoPE, nothing else.
    Family(
        model_type="llama",
        decoder="LlamaModel",
        attention="LlamaAttention",
        layers=like_llama("Llama"),
        causal_lm="LlamaForCausalLM",
    ),
    # Apertus (Swiss AI, 2025): RMSNorm on each head of q and k, an MLP of two products and xIELU.
    Family(
        model_type="apertus",
        decoder="ApertusModel",
        attention="ApertusAttention",
        causal_lm="ApertusForCausalLM",
        qk_norm="ApertusRMSNorm",
    ),
    # Arcee: an MLP of two products and a squared ReLU.
    Family(
        model_type="arcee",
        decoder="ArceeModel",
        attention="ArceeAttention",
        layers=LayerNames("ArceeDecoderLayer", "ArceeRMSNorm", ""),
        causal_lm="ArceeForCausalLM",
    ),
    # Code World Model (Copet et al., 2025): a sliding window in three layers of four.
    Family(
        model_type="cwm",
        decoder="CwmModel",
        attention="CwmAttention",
        layers=like_llama("Cwm"),
        causal_lm="CwmForCausalLM",
    ),
    # EXAONE 3 and 3.5 (LG AI Research, 2024): Llama's classes under another model type.
    Family(
        model_type="exaone",
        decoder="LlamaModel",
        attention="LlamaAttention",
        layers=like_llama("Llama"),
        causal_lm="LlamaForCausalLM",
    ),
    # Granite: embeddings, residuals, attention scores and logits have factors of their own. The scale of attention is
    # read from the module; the others are applied by its own layers, which are not fused.
    Family(
        model_type="granite",
        decoder="GraniteModel",
        attention="GraniteAttention",
    ),
    # HyperCLOVA X: Granite's factors, and norms behind attention and MLP if the configuration has them.
    Family(
        model_type="hyperclovax",
        decoder="HyperCLOVAXModel",
        attention="HyperCLOVAXAttention",
    ),
    # Jais 2: LayerNorm, an MLP of two products and a squared ReLU.
    Family(
        model_type="jais2",
        decoder="Jais2Model",
        attention="Jais2Attention",
        layers=LayerNames("Jais2DecoderLayer", "", ""),
        causal_lm="Jais2ForCausalLM",
    ),
    # Seed-OSS: biases on q, k and v, and dropout of the residuals in training.
    Family(
        model_type="seed_oss",
        decoder="SeedOssModel",
        attention="SeedOssAttention",
        layers=like_llama("SeedOss"),
        causal_lm="SeedOssForCausalLM",
    ),
    # SmolLM3 (Bakouch et al., 2025): no RoPE in one layer of four, windows if the configuration has them.
    Family(
        model_type="smollm3",
        decoder="SmolLM3Model",
        attention="SmolLM3Attention",
        layers=like_llama("SmolLM3"),
        causal_lm="SmolLM3ForCausalLM",
        rotates=lambda module: bool(module.use_rope),
    ),
    # StarCoder2 (Lozhkov et al., 2024): biases, LayerNorm, an MLP of two products.
    Family(
        model_type="starcoder2",
        decoder="Starcoder2Model",
        attention="Starcoder2Attention",
        layers=LayerNames("Starcoder2DecoderLayer", "", ""),
        causal_lm="Starcoder2ForCausalLM",
    ),
)
