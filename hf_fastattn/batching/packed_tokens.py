"""A token and the logarithm of its probability in one 64-bit number, so that both come back in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.batching.row_tokens import Array

# Tickets, tokens and, if they come, logarithms of their probabilities.
Arrived = tuple[Array, Array, NDArray[np.float32] | None]
# Bits of the token; those of the fp32 logarithm are above.
TOKEN_BITS = 32


def pack(tokens: Tensor, logprobs: Tensor | None) -> Tensor:
    """`[n]` int64 of `tokens [n]` and, if there are any, `logprobs [n]` fp32."""
    if logprobs is None:
        return tokens
    return tokens | (logprobs.view(torch.int32).long() << TOKEN_BITS)


def tokens_of(packed: Tensor) -> Tensor:
    """The tokens `[n]` of `packed [n]`."""
    return packed & ((1 << TOKEN_BITS) - 1)


def unpack(packed: Array, with_logprobs: bool) -> tuple[Array, NDArray[np.float32] | None]:
    """Tokens and, if they were packed, logarithms of their probabilities, both `[n]`, of `packed [n]` on the host."""
    tokens = packed & ((1 << TOKEN_BITS) - 1)
    return tokens, (packed >> TOKEN_BITS).astype(np.int32).view(np.float32) if with_logprobs else None
