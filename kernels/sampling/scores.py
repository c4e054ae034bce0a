"""What all kernels of token choice share: chunks, checks, scores without NaN, and `SamplingParams` from device memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels import launch

# The largest finite fp32 number.
LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(launch.LOG2E)
# Tokens a program. It also fixes which random number belongs to which token: another value gives other draws.
CHUNK = 4096
# A tensor, the shape it must have, and the dtypes it may have.
Expected = tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]


@triton.jit
def load_scores(row_ptr, token, ok):
    """fp32 logits of `token`, in its shape: NaN and masked tokens as -inf, +inf as LARGEST."""
    x = tl.load(row_ptr + token, mask=ok, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, LARGEST), float("-inf"))


@triton.jit
def inverse_temperature(params_ptr):
    """1 / temperature, with the temperature clamped so that the result is finite and above 0."""
    return tl.div_rn(1.0, tl.minimum(tl.maximum(tl.load(params_ptr), 1e-30), 1e30))


@triton.jit
def filter_params(params_ptr, vocab):
    """top_k (0 if off), top_p, min_p, and whether any of them drops tokens."""
    wanted = tl.load(params_ptr + 1)
    top_k = tl.where((wanted >= 1.0) & (wanted < vocab), wanted, 0.0).to(tl.int32)
    top_p = tl.load(params_ptr + 2)
    min_p = tl.load(params_ptr + 3)
    return top_k, top_p, min_p, (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)


def check_choice(logits: Tensor, out_tokens: Tensor, inputs: dict[str, Expected]) -> None:
    """Raise a `ValueError` unless logits are `[B, V]`, tokens `[B]` int64, and each of `inputs` is as it must be."""
    if logits.ndim != 2 or logits.dtype not in launch.DTYPES or logits.stride(-1) != 1 or not 0 < logits.shape[1] < 1 << 24:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()}, {logits.dtype}, must be [B, V], contiguous in "
            f"the last dimension, of a dtype among {launch.DTYPES}"
        )
    if out_tokens.shape != logits.shape[:1] or out_tokens.dtype != torch.int64:
        raise ValueError(
            f"out_tokens {tuple(out_tokens.shape)}, {out_tokens.dtype}, must be [B] = [{logits.shape[0]}], int64"
        )
    for name, (tensor, shape, dtypes) in inputs.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, {tensor.dtype}, must be {list(shape)}, contiguous, of a dtype among {dtypes}"
            )
