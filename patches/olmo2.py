"""OLMo 2 (Team OLMo, 2024): RMSNorm over all heads of q and of k at once, norms behind attention and MLP."""

from hf_fastattn.patches.family import Family

OLMO2 = Family(
    model_type="olmo2",
    decoder="Olmo2Model",
    attention="Olmo2Attention",
    projection_norm=True,
)
