"""Granite: Llama whose embeddings, residuals, attention scores and logits have factors of their own.

The scale of attention is read from the module; the others are applied by its own layers, which are not fused.
"""

from hf_fastattn.patches.family import Family

GRANITE = Family(model_type="granite", decoder="GraniteModel", attention="GraniteAttention")
