"""Jais 2: Llama with LayerNorm, an MLP of two products and a squared ReLU."""

from hf_fastattn.patches.family import Family

JAIS2 = Family(model_type="jais2", decoder="Jais2Model", attention="Jais2Attention")
