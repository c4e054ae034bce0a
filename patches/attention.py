"""The attention forward of a patched model: projections as they are, then pages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.cache import PagedCache
from hf_fastattn.kernels import reference
from hf_fastattn.kernels import rope as rope_kernels
from hf_fastattn.patches.module_state import call_original


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Project, rotate and append in one operation, attend over the pages; the original if no paged forward is on.

    Args:
        hidden_states: `[B, S, hidden]`, or `[1, T, hidden]` if the rows are packed.
        position_embeddings: cos and sin, `[1 or B, S, rotary dims]`.
        past_key_values: the cache; its batch says where tokens are written and what they read.

    Returns:
        Output of the shape of `hidden_states`, and None for the attention weights.
    """
    batch = past_key_values.paged_batch if isinstance(past_key_values, PagedCache) else None
    if batch is None:
        return call_original(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    assert position_embeddings is not None
    shape = (batch.tokens, -1, self.head_dim)
    q = self.q_proj(hidden_states).view(shape)
    k = self.k_proj(hidden_states).view(shape)
    v = self.v_proj(hidden_states).view(shape)
    window = past_key_values.layers[self.layer_idx].window
    k_pages, v_pages = past_key_values.pages_for(self.layer_idx, k)
    cos, sin = batch.rope(*position_embeddings)
    q = rope_kernels.rope_append(
        q,
        k,
        v,
        cos,
        sin,
        k_pages,
        v_pages,
        batch.slot_mapping(window, k.device),
    )
    out, _ = reference.paged_attention(q, k_pages, v_pages, batch.plans[window], scale=self.scaling)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
