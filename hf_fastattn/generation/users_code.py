"""Whether code of the user's runs between two forwards of a call, where it may change the model."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from torch import nn
from transformers.generation import GenerationMixin

from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.module_checks import has_global_hooks, why_not_module
from hf_fastattn.graphs.seen_modules import look
from hf_fastattn.wrappers import PREPARING, origin_of

# Where the code stands that runs before a prompt if no user has replaced it.
OURS = ("transformers.", "hf_fastattn.", "torch.")
# What runs between `generate()` and the decoder besides what it names.
BEHIND_GENERATE = ("generate", "_sample", "_beam_search", "_prefill", "__call__", "_call_impl", "forward", *PREPARING)
# What calls others of the model's methods.
LOOPS = ("generate", "_sample", "_beam_search", "_prefill")
# What is called of processors, criteria and streamers.
CALLED = ("__call__", "put", "on_finalized_text", "end")
# The same for functions that libraries put on a model for the length of a call, or longer.
LIBRARIES = (*OURS, "peft.", "accelerate.")


def may_be_users(ran: Any) -> bool:
    """Whether an object or a function is not Transformers' own, or calls what the user gave it."""
    if not _is_transformers(ran) or hasattr(ran, "_prefix_allowed_tokens_fn") or any(exchanged_methods(ran)):
        return True
    # A streamer asks the tokenizer that it was given.
    tokenizer = getattr(ran, "tokenizer", None)
    return not (tokenizer is None or _is_transformers(tokenizer))


def exchanged_methods(ran: Any) -> Iterator[str]:
    """What somebody has exchanged on the class of an object of Transformers', as `class.method`."""
    if not _is_transformers(ran):
        return
    kinds = type(ran).__mro__
    for name in CALLED:
        # As `inspect.getattr_static`, which takes ten times as long.
        method = next((vars(kind)[name] for kind in kinds if name in vars(kind)), None)
        if inspect.isfunction(method) and not origin_of(method).startswith(OURS):
            yield f"{type(ran).__name__}.{name}"


def _is_transformers(ran: Any) -> bool:
    return str(getattr(ran, "__module__", "")).startswith("transformers.")


def runs_as_written(kind: Any) -> bool:
    """Whether what runs between `generate()` of a patched class and its decoder is Transformers' or ours."""
    base = kind._fastattn_base
    methods = _called_by_generate(base)
    return _are_known((*methods(kind), *methods(base)))


def runs_between_forwards(model: Any, ran: Iterable[Any]) -> bool:
    """Whether the user's code may run between two forwards of a call, and change what the next one has to compute.

    Args:
        model: patched.
        ran: processors, criteria, streamer and loop of the call.
    """
    if any(map(may_be_users, ran)) or has_global_hooks():
        return True
    kind, own = type(model), filter(callable, vars(model).values())
    methods = (getattr(kind, name) for name in PREPARING)
    if not all(origin_of(method).startswith(LIBRARIES) for method in (*own, *methods)) or not runs_as_written(kind):
        return True
    # The hooks and forwards inside the decoder are what recorded forwards depend on.
    device = model.device
    return any(why_not_module(module, device) is not None for module in _around(model, model._fastattn.decoder(model)))


class ModelWatch:
    """Tells whether the user's code has changed a model since: modules, hooks, numbers, adapters, or weights in place.

    Writes through `.data` leave no trace.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._seen = model, look(model)
        self._weights = [weakref.ref(tensor) for tensor in model.parameters() if not tensor.is_inference()]
        self._before = self._state()

    def has_changed(self) -> bool:
        """Whether the model is no longer as it was when the watch began."""
        return self._state() != self._before or look(self._model) is not self._seen

    def _state(self) -> tuple[Any, ...]:
        versions = sum(0 if tensor is None else tensor._version for tensor in (ref() for ref in self._weights))
        return versions, None if self._seen.is_sure else fingerprint_of(self._model, self._model.device)


@functools.cache
def _called_by_generate(base: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Gives a class's methods up to the decoder's forward."""
    loops = (inspect.unwrap(getattr(GenerationMixin, name)) for name in LOOPS)
    names = dict.fromkeys(name for loop in loops for name in loop.__code__.co_names)
    return attrgetter(*BEHIND_GENERATE, *(name for name in names if inspect.isfunction(getattr(base, name, None))))


@functools.lru_cache(maxsize=64)
def _are_known(methods: tuple[Any, ...]) -> bool:
    # Where the code of a function stands never changes.
    return all(_written_in(method).startswith(OURS) for method in methods)


def _written_in(method: Any) -> str:
    """`origin_of` a method, or of what contextlib's decorator stands around."""
    origin = origin_of(method)
    return origin_of(method.__wrapped__) if origin == "contextlib" and hasattr(method, "__wrapped__") else origin


def _around(model: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model but those in its decoder, which comes too."""
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        if module is not decoder:
            stack += [child for child in module._modules.values() if child is not None]
