"""The attention forward of a patched model: projections as they are, then pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.patches.attention.qk_norm import normalise
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.modules.module_state import ModuleState, call_original, patched_forward
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import projected


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Project, rotate and append in one operation, attend over the pages; the original if no paged forward is on.

    Args:
        hidden_states: `[B, S, hidden]`, or `[1, T, hidden]` if the rows are packed; where the padded layout is kept,
            the cache's `padding` says which of the columns hold tokens, and the output of the others is zero.
        position_embeddings: cos and sin, `[1 or B, S, rotary dims]`.
        cache: the cache; its batch says where tokens are written and what they read.

    Returns:
        Output of the shape of `hidden_states`, and None for the attention weights.

    Raises:
        StockAttentionError: no paged forward is on, and the layer has a variant, which the original does not compute.
    """
    if not _is_paged(cache):
        state: ModuleState | None = vars(self).get(STATE)
        if state is not None and state.variant is not None:
            state.runtime.variants.refuse("no forward over pages is under way")
        return call_original(
            self,
            cache,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    assert position_embeddings is not None
    return _attend(self, hidden_states, position_embeddings, kwargs.get("position_ids"), cache), None


def attention_forward_with_positions(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_forward`, in the order of arguments of models whose attention needs the positions."""
    return attention_forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask,
        cache,
        position_ids=position_ids,
        **kwargs,
    )


def attention_forward_mask_first(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_forward`, in the order of arguments of Qwen2-VL and Qwen2.5-VL."""
    return attention_forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask,
        cache,
        position_ids=position_ids,
        **kwargs,
    )


ATTENTION_FORWARDS = tuple(
    patched_forward(forward, over=PagedCache)
    for forward in (attention_forward, attention_forward_with_positions, attention_forward_mask_first)
)


def _is_paged(cache: Any) -> bool:
    return isinstance(cache, PagedCache) and cache.paged_batch is not None


def attend_projected(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
    cache: PagedCache,
) -> Tensor:
    """All between the projections of q, k and v and that of the output: norm, RoPE, append, attention over the pages.

    Args:
        module: the attention module, patched.
        q: what `q_proj` gives, `[.., H * D]` for the T tokens of the batch, or with a gate a head `[.., H * 2 * D]`;
            `k` and `v` likewise, `[.., G * D]`. Rows may stand apart.
        position_embeddings: cos and sin, `[1 or B, S, rotary dims]`.
        position_ids: `[.., S]`, for families that scale queries by position.
        cache: its paged batch says where tokens are written and what they read.

    Returns:
        `[T, H * D]` in the dtype of v.
    """
    state: ModuleState = vars(module)[STATE]
    batch, family = cache.paged_batch, state.family
    assert batch is not None
    shape = (batch.tokens, -1, module.head_dim)
    if family.projection_norm:
        q, k = module.q_norm(q), module.k_norm(k)
    q, gate = _queries(q, family, shape)
    k, v = k.view(shape), v.view(shape)
    q, k, norm = normalise(module, family, q, k)
    # Under autocast a norm gives fp32, as its weights are; pages hold one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    window = cache.layers[module.layer_idx].window
    k_pages, v_pages = cache.pages_for(module.layer_idx, k)
    rotation = None if state.variant is None else state.variant.rotation
    if rotation is not None and rotation.run > 1:
        cos, sin = batch.places(rotation, k.device)
    else:
        cos, sin = batch.rope(*position_embeddings)
        inside = state.variant is not None and state.variant.rotates
        if inside or (family.rotates is not None and not family.rotates(module)):
            cos, sin = cos[:, :0], sin[:, :0]
    if family.query_scale is None:
        out = batch.append_and_attend(
            q, k, v, cos, sin, k_pages, v_pages, window, scale=module.scaling, variant=state.variant, **norm
        )
    else:
        q = batch.rope_append(q, k, v, cos, sin, k_pages, v_pages, window, **norm)
        q = q * _query_scale(module, family, position_ids, batch).to(q.dtype)
        out = batch.attend(q, k_pages, v_pages, window, scale=module.scaling, variant=state.variant)
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return out.reshape(batch.tokens, -1)


def _attend(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
    cache: PagedCache,
) -> Tensor:
    padding = cache.padding
    if padding is not None:
        hidden_states = padding.pack(hidden_states)
        position_embeddings = padding.pack_rope(*position_embeddings)
        position_ids = None if position_ids is None else padding.pack_positions(position_ids)
    q, k, v = (projected(linear, hidden_states) for linear in (module.q_proj, module.k_proj, module.v_proj))
    out = attend_projected(module, q, k, v, position_embeddings, position_ids, cache)
    out = module.o_proj(out.view(*hidden_states.shape[:-1], -1))
    return out if padding is None else padding.restore(out)


def _queries(projected: Tensor, family: Family, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Queries `[T, H, D]`, and the gate `[T, H, D]` on the output where the family has one."""
    if not family.output_gate:
        return projected.view(shape), None
    q, gate = projected.view(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
    return q, gate


def _query_scale(module: Any, family: Family, position_ids: Tensor | None, batch: Batch) -> Tensor:
    """The family's factor on the queries, `[T, 1, 1]`."""
    assert position_ids is not None and family.query_scale is not None
    scale = family.query_scale(module.config, position_ids)
    return scale.expand(batch.tokens // scale.shape[-1], -1).reshape(batch.tokens, 1, 1)
