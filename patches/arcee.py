"""Arcee: Llama with an MLP of two products and a squared ReLU."""

from hf_fastattn.patches.family import Family

ARCEE = Family(model_type="arcee", decoder="ArceeModel", attention="ArceeAttention")
