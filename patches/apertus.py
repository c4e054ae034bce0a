"""Apertus (Swiss AI, 2025): RMSNorm on each head of q and k, an MLP of two products and xIELU."""

from hf_fastattn.patches.family import Family

APERTUS = Family(
    model_type="apertus",
    decoder="ApertusModel",
    attention="ApertusAttention",
    qk_norm="ApertusRMSNorm",
)
