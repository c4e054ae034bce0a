"""The operations registered with `torch.library`, as `torch.ops.hf_fastattn.*`: for users' own loops and `torch.compile`.

They take the batch as tensors (`page_table`, `cu_seqlens_q`, `seq_lens`) and run the Triton kernels on CUDA devices, the
reference elsewhere. The reference reads these tensors on the host at each call: a loop over layers had better make one
`ReadPlan` and call `reference.paged_attention` with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.attention import reference, rope_reference, softmax_state
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.kernels.page_formats import is_eight_bits


def _plan(
    page_table: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, page_size: int, window: int | None, shared: int
) -> ReadPlan:
    pages, starts, lengths = page_table.tolist(), cu_seqlens_q.tolist(), seq_lens.tolist()
    counts = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    if len(pages) != len(lengths) or len(counts) != len(lengths):
        raise ValueError(
            f"page_table has {len(pages)} rows, seq_lens {len(lengths)}, cu_seqlens_q {len(counts)}; "
            "they must be [B, pages], [B] and [B + 1]"
        )
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"row {row} has {count} new tokens of {length}; seq_lens counts the new ones too")
        if length > len(pages[row]) * page_size:
            raise ValueError(f"row {row} has {length} tokens, but its {len(pages[row])} pages hold {page_size} each")
    prefixes = [(0, len(pages), shared)] if shared else []
    return ReadPlan(pages, counts, lengths, page_size, window, prefixes)


def _check_wide(k_pages: Tensor) -> None:
    # Their scales lie behind what PyTorch takes for the tensor, and a compiled graph may copy that alone.
    if is_eight_bits(k_pages):
        raise ValueError(
            f"k_pages are {k_pages.dtype}; these operators take pages in the dtype of q. Launchers in kernels.attention, "
            "and the reference beside them, take 8 bits"
        )


def _backend(x: Tensor) -> str:
    return choose_backend("auto", x.device, x.dtype, x.shape[-1])[0]


@torch.library.custom_op("hf_fastattn::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    shared_pages: int = 0,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed queries over paged keys and values.

    Args:
        q: `[T, H, D]` queries after RoPE.
        k_pages: `[N, P, G, D]`; `v_pages` likewise.
        page_table: `[B, pages]` int32.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin.
        seq_lens: `[B]` int32, keys after the append.
        scale: factor on the scores.
        window: keys a query sees, itself included; all by default.
        softcap: scores become `softcap * tanh(score / softcap)`.
        shared_pages: leading columns of `page_table` that are the same in all rows; the reference computes them once in
            decode.
        max_query_len: the most new tokens of a row; if not given it is read from `cu_seqlens_q`, which waits for the device.

    Returns:
        Output `[T, H, D]` and LSE `[T, H]` in fp32, natural logarithm.

    Raises:
        ValueError: the shapes or lengths do not fit each other.
    """
    _check_wide(k_pages)
    backend = _backend(q)
    if backend != "reference":
        from hf_fastattn.kernels.attention import paged

        longest = int(cu_seqlens_q.diff().max()) if max_query_len is None else max_query_len
        return paged.paged_attention(
            q, k_pages, v_pages, page_table, cu_seqlens_q, seq_lens,
            max_query_len=longest, scale=scale, window=window, softcap=softcap, hopper=backend == "hopper",
        )  # fmt: skip
    plan = _plan(page_table, cu_seqlens_q, seq_lens, k_pages.shape[1], window, shared_pages)
    out, lse = reference.paged_attention(q, k_pages, v_pages, plan, scale=scale, softcap=softcap)
    return out.clone() if out.data_ptr() == q.data_ptr() else out, lse.float()


@paged_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, page_table, cu_seqlens_q, seq_lens, scale,
    window=None, softcap=None, shared_pages=0, max_query_len=None,
):  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("hf_fastattn::rope_append", mutates_args=("k_pages", "v_pages"))
def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> Tensor:
    """[qk-norm] + RoPE + append; see `rope_reference.rope_append`, but `sin: [T, rotary dims]` has the model's own signs.

    Returns:
        `[T, H, D]` rotated queries.
    """
    _check_wide(k_pages)
    if _backend(q) != "reference":
        from hf_fastattn.kernels.attention import append

        launch = append.rope_append
    else:
        launch = rope_reference.rope_append
    norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "unit_offset": unit_offset}
    rotated = launch(q, k, v, cos, rope_reference.signed_sin(sin), k_pages, v_pages, slot_mapping, **norms)
    # The reference gives a part of what it rotated with the keys.
    return rotated.contiguous()


@rope_append.register_fake
def _(q, k, v, cos, sin, k_pages, v_pages, slot_mapping, q_norm=None, k_norm=None, eps=1e-6, unit_offset=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@torch.library.custom_op("hf_fastattn::merge_states", mutates_args=())
def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention state over the keys of both states; see `softmax_state.merge_states`."""
    if _backend(out_a) != "reference":
        from hf_fastattn.kernels.attention import merge

        return merge.merge_states(out_a, lse_a, out_b, lse_b)
    return softmax_state.merge_states(out_a, lse_a, out_b, lse_b)


@merge_states.register_fake
def _(out_a, lse_a, out_b, lse_b):  # type: ignore[no-untyped-def]
    return torch.empty_like(out_a), torch.empty_like(lse_a)
