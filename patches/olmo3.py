"""OLMo 3: OLMo 2 with sliding windows, and RoPE scaled in the layers without one alone."""

from hf_fastattn.patches.family import Family

OLMO3 = Family(
    model_type="olmo3",
    decoder="Olmo3Model",
    attention="Olmo3Attention",
    projection_norm=True,
)
