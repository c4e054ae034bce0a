"""RoPE inside attention by a model's own frequencies: what its rotary embedding does, as a transform of the kernels."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch

from hf_fastattn.kernels.variants.rotation import MOST_POSITIONS, RotaryFrequencies
from hf_fastattn.kernels.variants.variant import Variant
from hf_fastattn.patches.family import Family

# Kinds of RoPE in Transformers whose frequencies depend on how long the rows are.
BY_LENGTH = ("dynamic", "longrope")
# Positions of a run, in which keys are rotated as they are cached: a multiple of every tile of keys.
LONGEST_RUN = 128


class ModelRotation:
    """The rotation of a decoder's rotary embedding: default, linear, dynamic, llama3, YaRN, LongRoPE, partial.

    Args:
        decoder: with a `rotary_emb`.
        family: of the decoder.
        device: where attention reads the table.
        length: of the longest rows, for kinds of RoPE whose frequencies depend on it; `reach` gives another one.
        step: positions by which keys move as rows forget tokens, if they do.

    Raises:
        ValueError: the rotary embedding is none that has one frequency for each pair of elements.
    """

    def __init__(self, decoder: Any, family: Family, device: torch.device, length: int, step: int = LONGEST_RUN) -> None:
        if family.axes:
            raise ValueError(f"RoPE inside attention: positions of a {family.model_type} model are on three axes")
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or getattr(rotary, "inv_freq", None) is None:
            raise ValueError(f"RoPE inside attention: a {type(decoder).__name__} has no rotary_emb with frequencies")
        # Its frequencies change when it is called.
        self._rotary = copy.deepcopy(rotary)
        kind = getattr(rotary, "rope_type", "default")
        self._by_length = isinstance(kind, str) and any(name in kind for name in BY_LENGTH)
        self._length = length
        # In runs keys have frequencies of their own, and places that do not change.
        run = 1 if self._by_length else math.gcd(step, LONGEST_RUN)
        self.rotation = RotaryFrequencies.of(self._frequencies().to(device), self._factor, run)

    @property
    def _factor(self) -> float:
        return float(getattr(self._rotary, "attention_scaling", 1.0))

    def _frequencies(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            place = self._rotary.inv_freq.device
            positions = torch.tensor([[0, 1, self._length - 1]], device=place)
            cos, sin = self._rotary(torch.zeros(1, 3, 1, device=place), position_ids=positions)
            frequencies = self._rotary.inv_freq.float().clone()
        want = torch.stack((frequencies.cos(), frequencies.sin())).repeat(1, 2) * self._factor
        if cos.shape[-1] != want.shape[-1] or not torch.allclose(torch.stack((cos[0, 1], sin[0, 1])), want, atol=1e-4):
            raise ValueError(
                f"RoPE inside attention: {type(self._rotary).__name__} does not rotate halves by a frequency for each pair"
            )
        return frequencies

    def reach(self, length: int) -> None:
        """Rows have at most `length` tokens from now on: where frequencies depend on that, they are those of this length."""
        if length > MOST_POSITIONS:
            raise ValueError(
                f"RoPE inside attention: a row of {length} tokens has positions past {MOST_POSITIONS}; "
                "use FastAttnConfig(streaming=...), whose positions are those in the cache"
            )
        if self._by_length and length != self._length:
            self._length = length
            # In place: recorded steps read it where it lies.
            with torch.inference_mode(False), torch.no_grad():
                made = RotaryFrequencies.of(self._frequencies().to(self.rotation.table.device), self._factor)
                self.rotation.table.copy_(made.table)

    def applied(self, variant: Variant) -> Variant:
        """`variant`, of `rope="inside"`, with the rotation in place of each transform that is missing."""
        if variant.query_transform is None and variant.key_transform is None:
            return variant.rotated_by(self.rotation)
        # Functions of the user's own get vectors that are not rotated.
        return variant.rotated_by(replace(self.rotation, run=1))


def needs_rotation(variant: Variant) -> bool:
    """Whether a variant leaves the rotation of queries or keys to the model's frequencies."""
    return variant.rope == "inside" and (variant.query_transform is None or variant.key_transform is None)
