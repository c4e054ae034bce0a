"""Repetition penalty and suppressed end-of-sequence tokens on the logits of a decode step, in one launch.

The score s of a token seen before is divided by the penalty if s >= 0, else multiplied by it (Keskar et al., CTRL, 2019), in
fp32. The division is a product with the reciprocal, which may differ from PyTorch's in the last bit. Before step
`min_new_tokens` the end-of-sequence tokens are -inf. The plain PyTorch version is `reference.process_logits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.params import PARAMS

BLOCK = 2048


@triton.jit(do_not_specialize=["eos_count"])
def process_logits_kernel(
    logits_ptr, seen_ptr, out_ptr, eos_ptr, params_ptr, step_ptr, vocab, eos_count, stride_b, stride_s, stride_o,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one row; without a penalty `seen_ptr` is None, without suppressed tokens `eos_ptr`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = token < vocab
    x = tl.load(logits_ptr + b * stride_b + token, mask=ok).to(tl.float32)
    if seen_ptr is not None:
        penalty = tl.load(params_ptr + 4)
        seen = tl.load(seen_ptr + b * stride_s + token, mask=ok, other=0) != 0
        x = tl.where(seen, tl.where(x < 0, x * penalty, x * tl.div_rn(1.0, penalty)), x)
    if eos_ptr is not None:
        if tl.load(step_ptr).to(tl.float32) < tl.load(params_ptr + 5):
            for number in range(0, eos_count):
                x = tl.where(token == tl.load(eos_ptr + number), float("-inf"), x)
    tl.store(out_ptr + b * stride_o + token, x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["eos_count"])
def suppress_eos_kernel(
    logits_ptr, eos_ptr, params_ptr, step_ptr, vocab, eos_count, stride_b, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """The end-of-sequence tokens of one row, in place."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * stride_b
    if tl.load(step_ptr).to(tl.float32) < tl.load(params_ptr + 5):
        for begin in range(0, eos_count, BLOCK):
            number = begin + tl.arange(0, BLOCK)  # [BLOCK]
            token = tl.load(eos_ptr + number, mask=number < eos_count, other=-1)
            minus = tl.full([BLOCK], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + token, minus, mask=(token >= 0) & (token < vocab))


def process_logits(
    logits: Tensor,
    params: Tensor,
    *,
    seen: Tensor | None = None,
    eos: Tensor | None = None,
    step: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits after Transformers' repetition penalty and minimum of new tokens.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, any stride between rows.
        params: `[PARAMS]` fp32, of `SamplingParams`.
        seen: `[B, V]` uint8, nonzero for the tokens of the prompt and those chosen since; None: no penalty.
        eos: `[E]` int32 or int64; None: none is suppressed. An id outside of the vocabulary is ignored.
        step: `[1]` int32 or int64, how many tokens were chosen before; goes with `eos`.
        out: `[B, V]`, where to write: fp32 with `seen`, else of the dtype of logits or fp32; `logits` itself will do.
            By default a new fp32 tensor with `seen`, else `logits` itself.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    if logits.ndim != 2 or logits.dtype not in DTYPES or logits.stride(-1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()}, {logits.dtype}, must be [B, V], contiguous in "
            f"the last dimension, of a dtype among {DTYPES}"
        )
    if params.shape != (PARAMS,) or params.dtype != torch.float32 or not params.is_contiguous():
        raise ValueError(f"params {tuple(params.shape)}, {params.dtype}, must be [{PARAMS}], fp32, contiguous")
    if seen is not None and (seen.shape != logits.shape or seen.dtype != torch.uint8 or seen.stride(-1) != 1):
        raise ValueError(f"seen {tuple(seen.shape)}, {seen.dtype}, must be as logits, {tuple(logits.shape)}, uint8")
    if (eos is None) != (step is None):
        raise ValueError("eos and step go together")
    for name, tensor in (("eos", eos), ("step", step)):
        if tensor is not None and (tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} {tuple(tensor.shape)}, {tensor.dtype}, must be 1-D, int32 or int64")
    if out is None:
        out = logits if seen is None else torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    allowed = (torch.float32,) if seen is not None else (torch.float32, logits.dtype)
    if out.shape != logits.shape or out.dtype not in allowed or out.stride(-1) != 1:
        raise ValueError(f"out {tuple(out.shape)}, {out.dtype}, must be as logits, {tuple(logits.shape)}, among {allowed}")
    rows, vocab = logits.shape
    in_place = out is logits
    if not logits.numel() or (in_place and seen is None and eos is None):
        return out
    eos_count = 0 if eos is None else eos.shape[0]
    overlap = overlaps_launches(arch_of(logits.device))
    options = {"launch_pdl": True} if overlap else {}
    with on_device_of(logits):
        if in_place and seen is None:
            prepared(suppress_eos_kernel)[(rows,)](
                logits, eos, params, step, vocab, eos_count, logits.stride(0),
                BLOCK=32, OVERLAP=overlap, num_warps=1, **options,
            )  # fmt: skip
        else:
            prepared(process_logits_kernel)[(triton.cdiv(vocab, BLOCK), rows)](
                logits, seen, out, eos, params, step, vocab, eos_count,
                logits.stride(0), 0 if seen is None else seen.stride(0), out.stride(0),
                BLOCK=BLOCK, OVERLAP=overlap, num_warps=4, **options,
            )  # fmt: skip
    return out
