"""RoPE as a transform of queries and keys, for variants that rotate inside attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding (Su et al., 2021): `Variant(query_transform=r, key_transform=r, rope="inside")`.

    Args:
        cos: `[positions, width]` as Transformers' rotary embeddings give it for positions from 0 on: both halves of a row
            alike, or, of `pairs`, both numbers of a pair. Of longer heads what lies behind `width` is not rotated.
        sin: likewise.
        pairs: neighbouring elements are rotated together (GPT-J), not those of two halves (Llama).
    """

    cos: Tensor
    sin: Tensor
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.cos.ndim != 2 or self.cos.shape != self.sin.shape or self.cos.shape[1] % 2:
            raise ValueError(
                f"cos and sin have shapes {tuple(self.cos.shape)} and {tuple(self.sin.shape)}, expected [positions, width] "
                "twice, of an even width"
            )

    def __call__(self, x: Tensor, h: Tensor, position: Tensor) -> Tensor:
        width = self.cos.shape[1]
        own, half = x[:width], width // 2
        if self.pairs:
            across = torch.stack((-own[1::2], own[::2]), -1).flatten()
        else:
            across = torch.cat((-own[half:], own[:half]))
        turned = own * self.cos[position] + across * self.sin[position]
        return turned if width == x.shape[0] else torch.cat((turned, x[width:]))
