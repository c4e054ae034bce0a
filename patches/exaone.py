"""EXAONE 3 and 3.5 (LG AI Research, 2024): Llama's classes under another model type."""

from hf_fastattn.patches.family import Family

EXAONE = Family(model_type="exaone", decoder="LlamaModel", attention="LlamaAttention")
