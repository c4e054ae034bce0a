"""Ministral: Mistral with full and sliding-window layers mixed, as `layer_types` says."""

from hf_fastattn.patches.family import Family

MINISTRAL = Family(model_type="ministral", decoder="MinistralModel", attention="MinistralAttention")
