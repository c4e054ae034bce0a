"""Code World Model (Copet et al., 2025): Llama with a sliding window in three layers of four."""

from hf_fastattn.patches.family import Family

CWM = Family(model_type="cwm", decoder="CwmModel", attention="CwmAttention")
