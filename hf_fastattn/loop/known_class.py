"""Whether a model is its decoder, `lm_head` and nothing else, as the loops that run without its forward take it to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import GenerationMixin

from hf_fastattn.wrappers import PREPARING, origin_of, prepared_by

# Packages whose forwards compute what Transformers' own do; `functools.wraps` and PyTorch's decorators stand around some.
EQUIVALENT = ("transformers.", "liger_kernel.", "torch.")


def why_not_class(model: Any) -> str | None:
    """Why a patched model may do more than its decoder and `lm_head`, whatever it is asked for."""
    name = model._fastattn_base.__name__
    known = model._fastattn.family.causal_lm
    known = (known,) if isinstance(known, str) else known
    if name not in known or not model._fastattn_base.__module__.startswith("transformers."):
        return f"a {name} may do more than its decoder and lm_head"
    for kind in _classes_around_decoder(model):
        if not origin_of(kind.forward).startswith(EQUIVALENT):
            return f"the forward of class {kind.__name__} was replaced: undo that, or do the same in a LogitsProcessor"
    for method in PREPARING:
        if getattr(model._fastattn_base, method) is not getattr(GenerationMixin, method):
            return f"{name}.{method} is its own"
    # PEFT's are looked at when the first step is prepared.
    prepared = prepared_by(model)
    if not prepared.startswith(("transformers.", "peft.")):
        return f"the model's inputs are prepared by {prepared}"
    return None


def _classes_around_decoder(model: Any) -> Iterator[Any]:
    """Of the model and of what stands in it around its decoder."""
    yield model._fastattn_base
    module = model
    for name in model._fastattn.decoder_name.split(".")[:-1]:
        module = module._modules[name]
        yield type(module)
