"""What the Hopper kernels have to say differently to different versions of Triton."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.9 calls it `async_load`, and keeps the name of 3.6 as one that raises.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
