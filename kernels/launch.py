"""What every launcher needs: the tensor's device, block sizes, and checks of arguments."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.page_formats import is_eight_bits, why_not_pages

# Versions of Triton whose compiled kernels take all arguments in their order, compile-time constants included, and whose
# compiler may run in several threads.
TESTED = ("3.6.", "3.9.")
LOG2E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The architecture that stands for all without a row of their own in a table of launch configurations.
DEFAULT = 80
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
# The first compute capability that converts e4m3.
FP8_CAPABILITY = (8, 9)
# For kernels that use all registers on Hopper. Triton 3.9 sets the assembler's register allocation level to 2, which spills
# up to 170 bytes a thread; 4 is the assembler's default. The assembler of Triton 3.6 makes the same code with both.
ASSEMBLER_OPTIONS = "--regAllocOptLevel=4"


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def hash_callees(*functions: Any) -> None:
    """Make the hashes of what kernels call, before their own.

    Triton 3.6 leaves the constants of a callee out of its caller's hash if it has not hashed the callee before: a kernel
    would have two places on disk, by what ran first in a process, and be compiled for each (mended in Triton 3.9).
    """
    for function in functions:
        names = function.fn.__code__.co_names
        called = [function.fn.__globals__.get(name) for name in names]
        callees = [callee for callee in called if hasattr(callee, "cache_key") and hasattr(callee, "fn")]
        hash_callees(*callees)
        for callee in callees:
            _ = callee.cache_key


def overlaps_launches(arch: int) -> bool:
    """Whether dependent launch works (from Hopper on): a kernel starts before the launch ahead ends, and waits inside."""
    return arch >= 90


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: without it Triton multiplies fp32 in TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def matrix_precision(dtype: torch.dtype, rows: int) -> str:
    """The same for tiles of so many rows; above 16 the CUDA cores would take longer than memory.

    fp32 is three products in TF32 on the matrix unit: of what TF32 keeps of both, and of either with the rest of the other
    (Ootomo and Yokota, 2022). PyTorch's own attention in fp32 is computed so; the error is that of fp32.
    """
    return "tf32x3" if dtype == torch.float32 and rows > 16 else dot_precision(dtype)


def why_unsupported(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take these heads; None if they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (the Triton kernels take {', '.join(map(str, DTYPES))})"
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        return f"head dim {head_dim} (the Triton kernels take multiples of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM})"
    return None


def check_pages(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Raise a `ValueError` unless `q: [T, H, D]` fits pages `[N, P, G, D]`, both in a form that the kernels take."""
    reason = why_unsupported(q.shape[-1], q.dtype)
    if reason:
        raise ValueError(f"q has {reason}; use the reference backend")
    if k_pages.shape != v_pages.shape or k_pages.stride() != v_pages.stride():
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)} with strides {k_pages.stride()} and v_pages {tuple(v_pages.shape)} with "
            f"strides {v_pages.stride()} must be alike"
        )
    if q.ndim != 3 or k_pages.ndim != 4 or q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[2]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k_pages {tuple(k_pages.shape)}; expected [T, H, D] and [N, P, G, D] with "
            "H a multiple of G"
        )
    if is_eight_bits(k_pages) and k_pages.dtype == v_pages.dtype:
        check_eight_bits(k_pages, v_pages)
    elif q.dtype != k_pages.dtype or q.dtype != v_pages.dtype:
        raise ValueError(f"q is {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}; they must be of one dtype")
    if q.stride(-1) != 1 or k_pages.stride(-1) != 1:
        raise ValueError("q and the pages must be contiguous in their last dimension")


def check_eight_bits(k_pages: Tensor, v_pages: Tensor) -> None:
    """Raise a `ValueError` unless the kernels take these pages of 8 bits on their device."""
    reason = why_not_pages(k_pages, v_pages)
    if reason:
        raise ValueError(f"k_pages {tuple(k_pages.shape)} of {k_pages.dtype} have {reason}")
    if k_pages.dtype == torch.float8_e4m3fn and not converts_fp8(k_pages.device):
        raise ValueError(f"k_pages are {k_pages.dtype}, which GPUs before capability 8.9 do not convert; use int8")


def converts_fp8(device: torch.device) -> bool:
    """Whether kernels on the device can read e4m3."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def arch_of(device: torch.device) -> int:
    """Compute capability of the GPU that a launch on `device` is compiled for: 90 for Hopper."""
    return _cuda_arch(device) if device.type == "cuda" else _compiled_arch()


@functools.cache
def _cuda_arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return _row(10 * major + minor)


def _compiled_arch() -> int:
    """The architecture of the active compile target if there is no GPU; `DEFAULT` in the interpreter."""
    from triton.runtime import driver

    try:
        return _row(int(driver.active.get_current_target().arch))
    except RuntimeError:
        return DEFAULT


def _row(capability: int) -> int:
    # Datacenter Blackwell is 10.0 or 10.3; 12.0 is a desktop GPU, with less shared memory.
    return {90: 90, 100: 100, 103: 100}.get(capability, DEFAULT)
