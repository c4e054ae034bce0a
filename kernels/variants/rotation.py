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


# Positions are taken apart into these many of `fine`, and multiples of them in `coarse`: two small tables for all positions.
FINE, COARSE = 256, 4096
# Positions from here on have no entry.
MOST_POSITIONS = FINE * COARSE


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """Rotary position embedding by its frequencies, in halves as Llama's: both transforms of a `Variant(rope="inside")`.

    The angle of pair `i` at position `p` is `p * frequencies[i]`, of which cosine and sine come from two small tables by the
    addition theorem, so that they are as exact at position 100,000 as at 1. The Triton kernels know this transform: for a
    tile of keys they read a few rows of the tables, where tables by position would take as many bytes as the keys.

    Args:
        table: `[FINE + COARSE, 2, width / 2]` fp32, cosines and sines of positions 0 to FINE - 1, then of multiples of FINE;
            see `of`. Of longer heads what lies behind `width` is not rotated.
        factor: on rotated queries and on rotated keys (YaRN's and LongRoPE's attention factor).
        run: queries and keys come rotated to their places in runs of so many positions, see `places`, and are rotated by
            where their run begins: keys of a run alike, which the kernels do to queries instead. A power of 2; with 1
            they come unrotated.
    """

    table: Tensor
    factor: float = 1.0
    run: int = 1

    @staticmethod
    def of(frequencies: Tensor, factor: float = 1.0, run: int = 1) -> RotaryFrequencies:
        """From `frequencies: [width / 2]` in radians a position, on their device."""
        steps = torch.cat((torch.arange(FINE), torch.arange(COARSE) * FINE)).to(frequencies.device, torch.float64)
        angles = steps[:, None] * frequencies.to(torch.float64)
        return RotaryFrequencies(torch.stack((angles.cos(), angles.sin()), 1).float(), float(factor), run)

    def places(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin `[T, width]` by which vectors at `position: [T]` are rotated before they come here."""
        cos, sin = self.table[position % self.run].unbind(1)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @property
    def width(self) -> int:
        """Elements of a head that are rotated."""
        return 2 * self.table.shape[2]

    def blocks(self, head_dim: int) -> dict[str, int]:
        """How kernels cut heads, as fields of `Hooks`: matrix products take blocks of powers of 2 from 16 on."""
        rest, half = head_dim - self.width, self.width // 2
        block_half, block_rest = (max(1 << (count - 1).bit_length(), 16) for count in (half, max(rest, 1)))
        return {"rotated": self.width, "block_half": block_half, "block_rest": block_rest if rest else 0}

    def __call__(self, x: Tensor, h: Tensor, position: Tensor) -> Tensor:
        """`x: [.., D]`, rotated to `position: [..]`, any shape that broadcasts."""
        position = position - position % self.run
        fine, coarse = self.table[position % FINE], self.table[FINE + position // FINE]
        cos = (fine[..., 0, :] * coarse[..., 0, :] - fine[..., 1, :] * coarse[..., 1, :]) * self.factor
        sin = (fine[..., 1, :] * coarse[..., 0, :] + fine[..., 0, :] * coarse[..., 1, :]) * self.factor
        half = self.table.shape[2]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
