"""`silu(gate) * up`, the middle of a gated MLP (SwiGLU: Shazeer, 2020), in one launch.

`silu(g) = g / (1 + exp(-g))`, in fp32 with one rounding at the end. Gate and up may be two tensors or two halves of one.
The plain PyTorch version is `reference.silu_and_mul`; `matvec.gate_up_silu` fuses it with the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.quick_launch import launch

BLOCK = 1024


@triton.jit
def silu_gate(gate, up):
    """`silu(gate) * up` in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_and_mul_kernel(
    gate_ptr, up_ptr, out_ptr, width, stride_g, stride_u, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one row of `[T, width]`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = column < width
    gate = tl.load(gate_ptr + row * stride_g + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, silu_gate(gate, up).to(out_ptr.dtype.element_ty), mask=ok)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate: `[T, I]` bf16, fp16 or fp32, any stride between rows; `up` likewise. `fused.chunk(2, -1)` gives both views
            of one `[T, 2 * I]`.

    Returns:
        `[T, I]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype or gate.dtype not in DTYPES:
        raise ValueError(
            f"gate {tuple(gate.shape)}, {gate.dtype}, and up {tuple(up.shape)}, {up.dtype}, must both be [T, I] "
            f"of one dtype among {DTYPES}"
        )
    if gate.stride(-1) != 1 or up.stride(-1) != 1:
        raise ValueError(f"gate and up, strides {gate.stride()} and {up.stride()}, must be contiguous in the last dimension")
    tokens, width = gate.shape
    out = torch.empty((tokens, width), dtype=gate.dtype, device=gate.device)
    if not out.numel():
        return out
    overlap = overlaps_launches(arch_of(gate.device))
    with on_device_of(gate):
        options = dict(BLOCK=BLOCK, OVERLAP=overlap, num_warps=4, **({"launch_pdl": True} if overlap else {}))
        arguments = (gate, up, out, width, gate.stride(0), up.stride(0))
        launch(silu_and_mul_kernel, (tokens, -(-width // BLOCK)), arguments, options)
    return out
