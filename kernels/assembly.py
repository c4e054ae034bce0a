"""What kernels with PTX of their own have in common: whether they may run it, and its names of dtypes."""

from __future__ import annotations

import os

import triton.language as tl

# The interpreter runs no assembly: kernels compute the same from the bits.
ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
# By the names of dtypes in Triton.
FORMS = {"bf16": "bf16", "fp16": "f16"}
