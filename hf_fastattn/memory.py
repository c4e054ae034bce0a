"""`release_memory`: what a patched model keeps between calls, given back."""

from __future__ import annotations

from typing import Any

from hf_fastattn.generation.hooks import FastGenerationMixin
from hf_fastattn.patching import find_model


def release_memory(model: Any) -> None:
    """Give back what a patched model keeps for its next call: pages, those that `prefix_cache` keeps, recorded steps.

    Pages of caches that somebody holds stay with these. A model that is not patched keeps nothing.

    Raises:
        TypeError: not a Transformers model.
        RuntimeError: a call is under way, in this thread or another.
    """
    target = find_model(model)
    if isinstance(target, FastGenerationMixin) and not target._fastattn.runtime.release_memory():
        raise RuntimeError("release_memory() was called during a generate() of the model; call it after the call")
