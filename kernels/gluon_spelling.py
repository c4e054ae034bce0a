"""Names in Gluon that differ between versions of Triton."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has `async_copy_global_to_shared`; 3.9 has `async_load`, and keeps the old name only to raise an error.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpreted(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as another dtype, shape and layout: `_reinterpret` in Triton 3.6, `reinterpret` in 3.9."""
    if _REINTERPRETS:
        return buffer.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return buffer._reinterpret(DTYPE, SHAPE, LAYOUT)
