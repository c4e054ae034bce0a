"""Mixtral (Jiang et al., 2024): the attention of Mistral, experts instead of its feed-forward layers."""

from hf_fastattn.patches.family import Family

MIXTRAL = Family(model_type="mixtral", decoder="MixtralModel", attention="MixtralAttention")
