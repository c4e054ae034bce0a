"""What kernels of token choice read: scores without NaN, and the values of `SamplingParams` from device memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels import launch

# Of fp32.
LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(launch.LOG2E)


@triton.jit
def load_scores(row_ptr, token, ok):
    """fp32 logits without NaN and +inf; NaN, and what is masked, is -inf."""
    x = tl.load(row_ptr + token, mask=ok, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, LARGEST), float("-inf"))


@triton.jit
def inverse_temperature(params_ptr):
    """Finite and above 0, whatever the temperature."""
    return tl.div_rn(1.0, tl.minimum(tl.maximum(tl.load(params_ptr), 1e-30), 1e30))


@triton.jit
def filter_params(params_ptr, vocab):
    """top_k (0 if off), top_p, min_p, and whether any of them drops tokens."""
    wanted = tl.load(params_ptr + 1)
    top_k = tl.where((wanted >= 1.0) & (wanted < vocab), wanted, 0.0).to(tl.int32)
    top_p = tl.load(params_ptr + 2)
    min_p = tl.load(params_ptr + 3)
    return top_k, top_p, min_p, (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
