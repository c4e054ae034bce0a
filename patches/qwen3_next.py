"""Qwen3-Next: Gated DeltaNet (Yang et al., 2025) in three layers of four, gated attention in the fourth."""

from hf_fastattn.patches.family import Family

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    decoder="Qwen3NextModel",
    attention="Qwen3NextAttention",
    qk_norm="Qwen3NextRMSNorm",
    unit_offset=True,
    output_gate=True,
    linear_attention=True,
)
