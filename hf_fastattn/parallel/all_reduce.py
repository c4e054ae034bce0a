"""Sums and gathers over the ranks that a model is spread over, in the order of the current stream; graphs record them.

Every rank has the same result, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 has another name for it, and a warning for the old one.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum of every rank's contiguous `x`; `x` is written to, and may be what is returned."""
    dist.all_reduce(x, group=group)
    return x


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Write every rank's `x: [N, ..]`, one after the other, to `out: [ranks * N, ..]`."""
    _gather(out, x, group=group)


def gather_columns(x: Tensor, group: Any) -> Tensor:
    """Every rank's `x: [T, N]` side by side, `[T, ranks * N]`."""
    parts = x.new_empty(group.size(), *x.shape)
    all_gather(parts.view(-1, x.shape[1]), x.contiguous(), group)
    # Of a single row they are side by side already.
    return parts.transpose(0, 1).reshape(x.shape[0], -1)


def embedding(ids: Tensor, part: Tensor, rows: int, group: Any) -> Tensor:
    """What `ids: [B, S]` find in an embedding of so many rows of which this rank holds `part: [N, hidden]`.

    Returns:
        `[B, S, hidden]`.
    """
    # The last part may be shorter.
    inside = ids - dist.get_rank(group) * -(-rows // group.size())
    elsewhere = (inside < 0) | (inside >= part.shape[0])
    found = part[inside.masked_fill(elsewhere, 0)]
    return all_reduce(found.masked_fill_(elsewhere[..., None], 0), group)
