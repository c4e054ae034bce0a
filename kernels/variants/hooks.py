"""The functions of a variant by name, and what a kernel is compiled with: these functions as compile-time constants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The arguments with which each function of a variant is called; "sink" is made of `Variant(sinks=...)`.
HOOKS = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
    "query_transform": ("q", "h", "q_idx"),
    "key_transform": ("k", "h", "kv_idx"),
    "output_transform": ("o", "h", "q_idx"),
    "sink": ("h",),
}
VECTORS = ("q", "k", "o")


class Hooks(NamedTuple):
    """`@triton.jit` functions by the names of `HOOKS`, None where nothing is to be done; without any, plain attention.

    `sigmoid` stands for `Variant(normalizer="sigmoid")`, `causal` for its `causal`; `factor` is one on the scores that
    `score_mod` gets, which launchers put into the scale. The Gluon prefill takes `score_mod` in the parts of `distances.py`:
    `score_rest`, with what `score_by_distance` gives if there is one, times `last_factor`. Where both transforms are one
    `RotaryFrequencies`, `rotated` elements of a head are rotated by the table `tensors[rotation_table]`, instead of them:
    see `attention.rotated`; `rotation_factor` is that of queries and keys together, `run` that of `RotaryFrequencies`.
    """

    score_mod: Any = None
    mask_mod: Any = None
    query_transform: Any = None
    key_transform: Any = None
    output_transform: Any = None
    sink: Any = None
    sigmoid: bool = False
    causal: bool = True
    factor: float = 1.0
    score_by_distance: Any = None
    score_rest: Any = None
    last_factor: float = 1.0
    rotated: int = 0
    block_half: int = 0
    block_rest: int = 0
    rotation_factor: float = 1.0
    rotation_table: int = 0
    run: int = 1


NO_HOOKS = Hooks()


class CompiledVariant(NamedTuple):
    """A `Variant` for the Triton kernels; see `compiled.compile_variant`.

    Attributes:
        hooks: its functions.
        tensors: what they read, as kernels get it: at each launch, so that in-place updates are seen.
        window: as `Variant.window`.
        reads_row: whether a result depends on the row `b`.
        mask_by_head: whether `mask_mod` depends on the query head.
        reading: the functions that read tensors, by the names of `HOOKS`.
        hooks_16_bits: its functions for queries in 16 bits; None if they are the same.
        identity: the same for variants that are computed in the same way, whatever Python objects they come from.
    """

    hooks: Hooks = NO_HOOKS
    tensors: tuple[Tensor, ...] | None = None
    window: int | None = None
    reads_row: bool = False
    identity: str = ""
    mask_by_head: bool = False
    reading: tuple[str, ...] = ()
    hooks_16_bits: Hooks | None = None

    def hooks_for(self, dtype: torch.dtype) -> Hooks:
        """Its functions for queries of a dtype."""
        return self.hooks if self.hooks_16_bits is None or dtype.itemsize > 2 else self.hooks_16_bits

    @property
    def transforms_keys(self) -> bool:
        """Whether keys change as they are read."""
        return self.hooks.key_transform is not None or self.hooks.rotated > 0

    @property
    def hides_tiles(self) -> bool:
        """Whether whole tiles of keys may be hidden by more than causality and a window: see `attention.visited`."""
        return self.hooks.mask_mod is not None

    def window_with(self, window: int | None) -> int | None:
        """The shorter of the model's window and its own."""
        return min((w for w in (window, self.window) if w is not None), default=None)


PLAIN = CompiledVariant()
