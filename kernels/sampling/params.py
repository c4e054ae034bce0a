"""What a draw depends on, as one device tensor: a captured graph serves any temperature, k and p.

`SamplingParams.values` are written to an fp32 tensor `[PARAMS]`, which the kernels read at every launch
(`scores.py`). Importing this needs no Triton.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """Transformers' parameters of the same names; the defaults change nothing.

    Attributes:
        temperature: above 0; scores are multiplied by its reciprocal.
        top_k: tokens kept, with all that tie with the last of them; 0, or the vocabulary or more, keeps all.
        top_p: a token is kept if the mass of strictly likelier ones is below; 1 keeps all.
        min_p: tokens less likely than this share of the likeliest are dropped; 0 keeps all.
        repetition_penalty: above 0; 1 changes nothing.
        min_new_tokens: before this step no end-of-sequence token is chosen.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("top_k", "min_new_tokens"):
            # The device tensor is fp32, which is exact for integers up to 2^24.
            if not 0 <= getattr(self, name) <= 1 << 24:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to {1 << 24}")

    def values(self) -> tuple[float, ...]:
        """The `PARAMS` numbers in the order of the device tensor."""
        return tuple(map(float, astuple(self)))

    def tensor(self, device: torch.device | str) -> Tensor:
        """A new fp32 tensor `[PARAMS]` of the values."""
        return torch.tensor(self.values(), dtype=torch.float32, device=device)


PARAMS = len(fields(SamplingParams))
