"""Which kernels compute: PyTorch's (`reference`, any device), Triton's (`triton`, CUDA devices), or these and Gluon's
where they are quicker (`hopper`, H100 and H200)."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from hf_fastattn.kernels.launch import why_unsupported

# The first with bf16 tensor cores and with cp.async, which the pipelined loops need.
MIN_CAPABILITY = (8, 0)
HOPPER = (9, 0)
# Gluon changes from release to release: any other version of Triton must first pass `hopper_trial`.
GLUON_TESTED = ("3.6.", "3.9.")
# The head dims that the Gluon kernel takes; the trial runs all of them.
GLUON_HEAD_DIMS = (64, 128, 256)


@functools.cache
def choose_backend(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, batch_invariant: bool = False
) -> tuple[str, str]:
    """`("reference", "triton" or "hopper", why)` for heads of `head_dim` and `dtype` on `device`.

    Args:
        asked: `FastAttnConfig.backend`.
        batch_invariant: `FastAttnConfig.batch_invariant`, which the reference cannot promise.

    Raises:
        ValueError: the backend that was asked for cannot run there.
    """
    name, why = _choose(asked, device, dtype, head_dim)
    if name == "reference" and batch_invariant:
        raise ValueError(f"batch_invariant=True needs the Triton kernels, which do not run here ({why})")
    return name, why


def _choose(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    if asked == "reference":
        return "reference", "asked for"
    reason = _why_not_triton(device, dtype, head_dim)
    if reason is None and asked != "triton":
        hopper, reason = _try_hopper(device, head_dim)
        if hopper:
            return "hopper", "asked for" if asked == "hopper" else reason
        if asked == "auto":
            return "triton", reason
    if reason is None:
        return "triton", "asked for"
    if asked != "auto":
        raise ValueError(f"backend={asked!r} cannot run here: {reason}; use backend='auto' or 'reference'")
    return "reference", reason


def gluon_experts(backend: str) -> bool:
    """Whether the Gluon kernels of experts run with a backend that was chosen; the trial does not run these."""
    if backend != "hopper":
        return False
    import triton

    return triton.__version__.startswith(GLUON_TESTED)


def _try_hopper(device: torch.device, head_dim: int) -> tuple[bool, str]:
    """Whether the Gluon kernels run on `device`, and why."""
    import triton

    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != HOPPER:
        return False, f"a {device.type} device" if device.type != "cuda" else "a CUDA device that is not Hopper"
    version = triton.__version__
    if version.startswith(GLUON_TESTED):
        return True, f"a Hopper GPU, and Triton {version}, which was tested"
    if head_dim not in GLUON_HEAD_DIMS:
        return False, f"head dim {head_dim}, which the Gluon kernel does not take"
    from hf_fastattn.kernels.attention.hopper_trial import why_not_trusted

    trial = f"a trial of the Gluon kernel in a process of its own with Triton {version}, which was not tested before, gave"
    reason = why_not_trusted(version, device)
    return reason is None, f"{trial} {reason or 'right results'}"


def _why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # Triton's documented switch: kernels run on the CPU, slowly, for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"Triton needs a CUDA device, this is {device.type}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(device)}, Triton's kernels need (8, 0)"
    return why_unsupported(head_dim, dtype)
