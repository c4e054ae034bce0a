"""Gradient checkpointing: with it, a layer in train mode computes without the cache, so that it can be computed again.

Without gradients there is nothing to compute again, and Transformers since 5.24 keeps the cache then. Before, it dropped it
all the same, and `generate()` went on with the last token alone; patched, it keeps it there too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_fastattn.transformers_version import CHECKPOINTING_NEEDS_GRADIENTS


def drops_cache(decoder: Any) -> bool:
    """Whether the layers of a decoder, run now, are to leave the cache alone."""
    return torch.is_grad_enabled() and _checkpoints(decoder)


@contextlib.contextmanager
def cache_kept(decoder: Any) -> Iterator[None]:
    """Without gradients, layers called inside keep the cache in every version of Transformers."""
    if CHECKPOINTING_NEEDS_GRADIENTS or torch.is_grad_enabled() or not _checkpoints(decoder):
        yield
        return
    layers = [layer for layer in decoder.layers if getattr(layer, "gradient_checkpointing", False)]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _checkpoints(decoder: Any) -> bool:
    return bool(decoder.training) and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)
