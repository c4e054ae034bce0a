"""StarCoder2 (Lozhkov et al., 2024): Llama's attention with biases, LayerNorm, an MLP of two products."""

from hf_fastattn.patches.family import Family

STARCODER2 = Family(model_type="starcoder2", decoder="Starcoder2Model", attention="Starcoder2Attention")
