"""Names in Gluon that differ between versions of Triton."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has `async_copy_global_to_shared`; 3.9 has `async_load`, and keeps the old name only to raise an error.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# The same names, for copies of 16 bytes a thread.
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
