"""Names in Gluon that differ between versions of Triton."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has `async_copy_global_to_shared`; 3.9 has `async_load`, and keeps the old name only to raise an error.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
