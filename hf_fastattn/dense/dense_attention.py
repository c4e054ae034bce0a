"""Our kernels over dense keys and values `[B, G, L, D]`, as any Transformers cache returns them, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.dense.causal_layout import PAGE_SIZE, CausalLayout
from hf_fastattn.kernels.attention import reference
from hf_fastattn.kernels.launch import on_device_of


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: CausalLayout,
    *,
    backend: str,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last S tokens of each row over its keys.

    Args:
        q: `[B, H, S, D]` queries, any strides.
        k: `[B, G, L, D]` keys, any strides; `v` values. Read in place where a row is a whole number of tokens from the
            next and `v` has the strides of `k`; copied otherwise.
        layout: which keys hold tokens, and the window.
        backend: "triton" or "reference".
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[H]` logits of a key without a value, one a head (Xiao et al., 2023, "Attention Sinks").

    Returns:
        `[B, S, H, D]` in q's dtype; zero for queries that are padding.
    """
    if backend == "triton" and q.shape[2] == 1:
        return _decode(q, k, v, layout, scale, softcap, sinks)
    if _strides(k) != _strides(v) or not _is_token_storage(k):
        k, v = k.contiguous(), v.contiguous()
    run = _append if backend == "triton" else _reference
    return run(q, k, v, layout, scale, softcap, sinks)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, layout: CausalLayout, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One new token a row. The first layer of a forward plans and checks the launch, those like it repeat it."""
    stream = _stream(q.device)
    like = (q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device, scale, softcap, stream)
    known = layout.launches.get(like)
    rows, heads, _, dim = q.shape
    if known is not None:
        launch, lse = known
        out = torch.empty((rows, 1, heads, dim), dtype=q.dtype, device=q.device)
        with on_device_of(q):
            launch.again(q, k, v, out)
        return out if sinks is None else with_sinks(out[:, 0], lse, sinks)[:, None]
    from hf_fastattn.kernels.attention.decode import decode_launch

    in_place = q.stride(3) == 1 and _strides(k) == _strides(v) and _is_token_storage(k)
    if not in_place:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    first, lse, made = decode_launch(
        q[:, :, 0], *_paged(k, v), layout.page_table(_row_step(k), _page_size(k)), layout.seq_lens,
        scale=scale, window=layout.window if layout.is_narrow else None, softcap=softcap,
        workspace=layout.workspace(q.device, stream),
    )  # fmt: skip
    if in_place and made is not None:
        layout.launches[like] = made, lse
    return with_sinks(first, lse, sinks)[:, None]


def _append(
    q: Tensor, k: Tensor, v: Tensor, layout: CausalLayout, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Several new tokens a row. The first layer of a forward plans and checks the launch, those like it repeat it."""
    rows, heads, queries, dim = q.shape
    packed = q.transpose(1, 2).reshape(rows * queries, heads, dim).contiguous()
    stream = _stream(q.device)
    like = (q.shape, k.shape, k.stride(), q.dtype, q.device, scale, softcap, stream)
    known = layout.launches.get(like)
    if known is not None:
        launch, lse = known
        out = torch.empty_like(packed)
        with on_device_of(q):
            launch.again(packed, k, v, out)
        return with_sinks(out, lse, sinks).view(rows, queries, heads, dim)
    from hf_fastattn.kernels.attention.paged import attention_launch

    out, lse, made = attention_launch(
        packed, *_paged(k, v), layout.page_table(_row_step(k), _page_size(k)), layout.cu_seqlens(queries), layout.seq_lens,
        max_query_len=queries, scale=scale, window=layout.window if layout.is_narrow else None, softcap=softcap,
        workspace=layout.workspace(q.device, stream),
    )  # fmt: skip
    if made is not None:
        layout.launches[like] = made, lse
    return with_sinks(out, lse, sinks).view(rows, queries, heads, dim)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, layout: CausalLayout, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    rows, heads, queries, dim = q.shape
    tokens = q.transpose(1, 2)
    real = layout.real_queries(queries) if layout.padded else None
    packed = (tokens.reshape(-1, heads, dim) if real is None else tokens[real]).contiguous()
    row_step = _row_step(k)
    count = (rows - 1) * row_step + k.shape[2]
    plan = layout.plan(queries, row_step)
    given = packed, _pages(k, count), _pages(v, count), plan
    if sinks is None:
        out = reference.paged_output(*given, scale=scale, softcap=softcap)
    else:
        out = with_sinks(*reference.paged_attention(*given, scale=scale, softcap=softcap), sinks)
    if real is None:
        return out.view(rows, queries, heads, dim)
    padded = out.new_zeros(rows, queries, heads, dim)
    padded[real] = out
    return padded


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """`[T, H, D]` as if the sink had been in the softmax: its share of the weight is `sigmoid(sink - lse)`."""
    if sinks is None:
        return out
    share = torch.sigmoid(lse - sinks.to(lse.dtype))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def _stream(device: torch.device) -> int:
    """A number for the stream that launches on `device` go to."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _strides(k: Tensor) -> tuple[int, int, int]:
    """From a row, a head and a token to the next; a dimension of size 1 has a stride that says nothing."""
    rows, groups, tokens, dim = k.shape
    row, head, token = k.stride()[:3]
    return row if rows > 1 else 0, head if groups > 1 else 0, token if tokens > 1 else dim


def _row_step(k: Tensor) -> int:
    """Tokens from a row to the next."""
    row, _, token = _strides(k)
    return row // token


def _is_token_storage(k: Tensor) -> bool:
    row, _, token = _strides(k)
    return k.stride(3) == 1 and token > 0 and row % token == 0


def _page_size(k: Tensor) -> int:
    """Tokens a page: a view may not reach past its storage, which a row of fewer tokens than a page would."""
    return PAGE_SIZE if k.shape[2] >= PAGE_SIZE else 1


def _paged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _pages(k, 1, _page_size(k)), _pages(v, 1, _page_size(v))


def _pages(k: Tensor, count: int, size: int = 1) -> Tensor:
    """`[count, size, G, D]` pages, each beginning one token after the last; all have numbers, `count` are in the view."""
    _, head, token = _strides(k)
    return k.as_strided((count, size, k.shape[1], k.shape[3]), (token, token, head, 1), k.storage_offset())
