"""Llama (Touvron et al., 2023): grouped-query attention, rotate-half RoPE, nothing else."""

from hf_fastattn.patches.family import Family

LLAMA = Family(model_type="llama", decoder="LlamaModel", attention="LlamaAttention")
