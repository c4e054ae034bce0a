"""Seed-OSS: Llama with biases on q, k and v, and dropout of the residuals in training."""

from hf_fastattn.patches.family import Family

SEED_OSS = Family(model_type="seed_oss", decoder="SeedOssModel", attention="SeedOssAttention")
