"""HyperCLOVA X: Granite's factors, and norms behind attention and MLP if the configuration has them."""

from hf_fastattn.patches.family import Family

HYPERCLOVAX = Family(model_type="hyperclovax", decoder="HyperCLOVAXModel", attention="HyperCLOVAXAttention")
