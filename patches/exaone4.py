"""EXAONE 4.0: RMSNorm on each head of q and k, no RoPE in the full layers between those with windows."""

from hf_fastattn.patches.family import Family

EXAONE4 = Family(
    model_type="exaone4",
    decoder="Exaone4Model",
    attention="Exaone4Attention",
    qk_norm="Exaone4RMSNorm",
    rotates=lambda module: module.sliding_window is None or module.is_sliding,
)
