"""Mistral (Jiang et al., 2023): Llama with a sliding window in every layer, if the configuration has one."""

from hf_fastattn.patches.family import Family

MISTRAL = Family(model_type="mistral", decoder="MistralModel", attention="MistralAttention")
