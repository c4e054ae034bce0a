"""Attention of one layer in Transformers' continuous batching: append to the pages, then read them where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_fastattn.dense.dense_attention import with_sinks
from hf_fastattn.kernels.attention import reference
from hf_fastattn.stock_batching.steps import PagedStep, token_pages

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace


@dataclass
class PagedLayer:
    """One layer in one forward.

    Attributes:
        step: what it reads and writes, shared with other layers.
        key: `[1, G, T, D]` new keys, to be written to the pages; or `[1, G, L, D]` all that a step with a window reads,
            new ones, which have been written, included.
        value: likewise.
        k_pages: `[N, P, G, D]` pages of the layer's keys; `v_pages` of values, with the same strides.
        workspaces: by stream; live with the cache.
    """

    step: PagedStep
    key: Tensor
    value: Tensor
    k_pages: Tensor
    v_pages: Tensor
    workspaces: dict[int, Workspace] = field(default_factory=dict)

    @property
    def is_gathered(self) -> bool:
        """Whether `key` and `value` are all that is read, row after row."""
        return self.step.slots is None


def paged_layer_attention(
    layer: PagedLayer,
    query: Tensor,
    *,
    backend: str,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write the new keys and values and attend.

    Args:
        query: `[1, H, T, D]` queries after RoPE, any strides.
        backend: "reference", "triton" or "hopper".
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[H]` logits of a key without a value, one a head.

    Returns:
        `[1, T, H, D]` in the dtype of the queries; anything for tokens that are padding.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, layer.key, layer.value))
    if layer.is_gathered:
        q = q.contiguous()
        if k.stride() != v.stride() or k.stride(-1) != 1:
            k, v = k.contiguous(), v.contiguous()
        run = _gathered_reference if backend == "reference" else _gathered_triton
        out, lse = run(layer, q, k, v, scale, softcap)
    elif backend == "reference":
        out, lse = _in_place_reference(layer, q, k, v, scale, softcap)
    else:
        out, lse = _in_place_triton(layer, q, k, v, backend, scale, softcap)
    return (out if sinks is None else with_sinks(out, lse, sinks))[None]


def _in_place_triton(
    layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, backend: str, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    from hf_fastattn.kernels.attention.append import rope_append
    from hf_fastattn.kernels.attention.paged import paged_attention

    step = layer.step
    assert step.slots is not None
    # No dimension is rotated: the model has done that.
    nothing = q.new_empty(q.shape[0], 0)
    q = rope_append(q, k, v, nothing, nothing, layer.k_pages, layer.v_pages, step.slots)
    return paged_attention(
        q, layer.k_pages, layer.v_pages, step.page_table, step.cu_seqlens_q, step.seq_lens,
        max_query_len=step.max_query_len, scale=scale, softcap=softcap, workspace=_workspace(layer, q.device),
        hopper=backend == "hopper", work_lists=step.work_lists,
    )  # fmt: skip


def _gathered_triton(
    layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    from hf_fastattn.kernels.attention.paged import paged_attention

    step = layer.step
    return paged_attention(
        q, token_pages(k, step.page_size), token_pages(v, step.page_size), step.page_table, step.cu_seqlens_q, step.seq_lens,
        max_query_len=step.max_query_len, scale=scale, window=step.window, softcap=softcap,
        workspace=_workspace(layer, q.device),
    )  # fmt: skip


def _in_place_reference(
    layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    step = layer.step
    assert step.slots is not None
    for pages, new in ((layer.k_pages, k), (layer.v_pages, v)):
        pages.flatten(0, 1).index_copy_(0, step.slots, new)
    return _reference(q.contiguous(), layer.k_pages, layer.v_pages, step, scale, softcap)


def _gathered_reference(
    layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return _reference(q, k[:, None], v[:, None], layer.step, scale, softcap)


def _reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, step: PagedStep, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    real = step.plan.cu_seqlens_q[-1]
    out, lse = reference.paged_attention(q[:real], k_pages, v_pages, step.plan, scale=scale, softcap=softcap)
    if real == len(q):
        return out, lse
    padding = len(q) - real
    return torch.cat((out, out.new_zeros(padding, *out.shape[1:]))), torch.cat((lse, lse.new_zeros(padding, lse.shape[1])))


def _workspace(layer: PagedLayer, device: torch.device) -> Workspace:
    from hf_fastattn.kernels.attention.workspace import Workspace

    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if stream not in layer.workspaces:
        layer.workspaces[stream] = Workspace(device)
    return layer.workspaces[stream]
