"""`Variant`: attention as a user wants it, in a few lines of PyTorch, for every kernel."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.variants.hooks import HOOKS
from hf_fastattn.kernels.variants.rotation import RotaryFrequencies, Rotation

NORMALIZERS = ("softmax", "sigmoid")
ROPES = ("model", "inside")
FUNCTIONS = ("score_mod", "mask_mod", "query_transform", "key_transform", "output_transform")


@dataclass(frozen=True, eq=False)
class Variant:
    """What attention does besides `softmax(scale * q k^T) v`, in the convention of PyTorch's FlexAttention.

    Functions are called with scalar tensors: `b`, `h`, `q_idx` and `kv_idx` are int32; `q_idx` and `kv_idx` are positions in
    the row without padding, `b` is the caller's row and `h` the query head (the key/value head in `key_transform`). They use
    ordinary operations of PyTorch, and read tensors that they close over or that `parameters` names. They are called only
    for keys that causality and the window let a query see.

    Args:
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`, the score after scaling and `softcap`, to another one.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)`, whether the query sees the key.
        query_transform: `query_transform(q, h, q_idx)` of a vector `[D]` in fp32, after the model's own norm and RoPE.
        key_transform: `key_transform(k, h, kv_idx)`, likewise, as keys are read.
        output_transform: `output_transform(o, h, q_idx)` of a query head's output `[D]`.
        normalizer: `"softmax"`, or `"sigmoid"`: weights are `sigmoid(score)`, not normalised.
        window: keys a query sees, itself included, where the model's own window is not shorter.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[H]`, a score a head that takes part in the softmax and has no value.
        alibi: `[H]` slopes: `slope * (kv_idx - q_idx)` is added to the score, before `score_mod`.
        causal: a query sees no key after itself. With False `mask_mod` alone decides, among the keys in the cache.
        parameters: tensors and numbers, given to each function that has an argument of the name.
        rope: where queries and keys are rotated: `"model"`, before the cache, so that transforms get rotated vectors; or
            `"inside"`: the cache keeps keys as they are before RoPE, and the transforms rotate. `patch` puts the rotation by
            the model's own frequencies in place of a transform that is missing; see `with_frequencies` and `with_rotation`.

    Raises:
        TypeError: a field has the wrong type, or a function takes other arguments.
        ValueError: a field is out of its range, or nothing reads a parameter.
    """

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    query_transform: Callable[..., Any] | None = None
    key_transform: Callable[..., Any] | None = None
    output_transform: Callable[..., Any] | None = None
    normalizer: str = "softmax"
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    causal: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rope: str = "model"

    def __post_init__(self) -> None:
        if self.rope not in ROPES:
            raise ValueError(f"rope={self.rope!r} is unknown; choose one of {ROPES}")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer={self.normalizer!r} is unknown; choose one of {NORMALIZERS}")
        if self.window is not None and (not isinstance(self.window, int) or isinstance(self.window, bool)):
            raise TypeError(f"window must be a number of keys (int) or None, got {self.window!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, the query's own key")
        _check_softcap(self.softcap)
        for name in ("sinks", "alibi"):
            _check_per_head(name, getattr(self, name))
        if self.sinks is not None and self.normalizer != "softmax":
            raise ValueError(f"sinks add to the sum of a softmax, but normalizer={self.normalizer!r} has none")
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be True or False, got {self.causal!r}")
        _check_parameters(self.parameters)
        read = {name for hook in FUNCTIONS for name in _check_function(hook, getattr(self, hook), self.parameters)}
        unread = sorted(set(self.parameters) - read)
        if unread:
            raise ValueError(
                f"parameters {unread} are read by none of the functions; a function takes a parameter as an argument of its "
                "name, after its own: score_mod(score, b, h, q_idx, kv_idx, bias)"
            )
        if is_triton(self.score_mod) and (self.softcap is not None or self.alibi is not None):
            raise ValueError("softcap and alibi cannot be put before a score_mod of Triton; compute them in it")

    def with_rotation(self, cos: Tensor, sin: Tensor, *, pairs: bool = False) -> Variant:
        """Of `rope="inside"`: with the model's own rotation in place of each transform of queries or keys that is missing.

        Args:
            cos: `[positions, width]`, see `Rotation`; `sin` likewise.
        """
        return self.rotated_by(Rotation(cos, sin, pairs))

    def with_frequencies(self, frequencies: Tensor, factor: float = 1.0) -> Variant:
        """`with_rotation` by `frequencies: [width / 2]` in radians a position, and a `factor` on queries and on keys.

        This is what a patched model does with its own frequencies, and what the Triton kernels are made for.
        """
        return self.rotated_by(RotaryFrequencies.of(frequencies, factor))

    def rotated_by(self, rotation: Callable[..., Any]) -> Variant:
        """Of `rope="inside"`: with `rotation` in place of each transform of queries or keys that is missing."""
        if self.rope != "inside":
            raise ValueError(f"rope={self.rope!r}: queries and keys are rotated by the model; give Variant(rope='inside')")
        return dataclasses.replace(
            self,
            query_transform=self.query_transform or rotation,
            key_transform=self.key_transform or rotation,
        )

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Each hook's function with its parameters, by its name in `hooks.HOOKS`; softcap and ALiBi are in the scores'.

        Raises:
            ValueError: nothing rotates the queries or keys that have to be rotated inside.
        """
        if self.rope == "inside" and (self.query_transform is None or self.key_transform is None):
            raise ValueError(
                "rope='inside' leaves rotation to query_transform and key_transform, of which one is missing; give both, or "
                "take variant.with_frequencies(frequencies) or with_rotation(cos, sin)"
            )
        found = {hook: self._bound(hook) for hook in FUNCTIONS if getattr(self, hook) is not None}
        if self.softcap is not None or self.alibi is not None:
            found["score_mod"] = BuiltInScore(self.softcap, self.alibi, found.get("score_mod"))
        if self.sinks is not None:
            found["sink"] = partial(_sink, self.sinks)
        return found

    def _bound(self, hook: str) -> Callable[..., Any]:
        function = getattr(self, hook)
        names = parameters_of(hook, function, self.parameters)
        return function if is_triton(function) or not names else partial(function, **{n: self.parameters[n] for n in names})


@dataclass(frozen=True)
class BuiltInScore:
    """Softcap, ALiBi and a user's function in one; the score comes `divided` by the softcap or not."""

    softcap: float | None
    alibi: Tensor | None
    then: Callable[..., Tensor] | None
    divided: bool = False

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score if self.divided else score * (1.0 / self.softcap))
        if self.alibi is not None:
            # Positions are exact in fp32, and so converted once a query and once a key.
            score = score + self.alibi[h] * (kv_idx.float() - q_idx.float())
        return score if self.then is None else self.then(score, b, h, q_idx, kv_idx)


def _sink(sinks: Tensor, h: Tensor) -> Tensor:
    return sinks[h]


def rotation_of(variant: Variant) -> RotaryFrequencies | None:
    """What rotates both queries and keys, if that is one `RotaryFrequencies`: the kernels do it themselves."""
    rotation, is_one = variant.key_transform, variant.key_transform is variant.query_transform
    return rotation if is_one and isinstance(rotation, RotaryFrequencies) else None


def is_triton(function: Any) -> bool:
    """Whether it is a `@triton.jit` function; Triton is not imported for the question."""
    return any(kind.__name__ in ("JITFunction", "InterpretedFunction") for kind in type(function).__mro__)


def parameters_of(hook: str, function: Any, parameters: Mapping[str, Any]) -> list[str]:
    """The parameters that a function takes after the arguments of its hook, in its order."""
    own = HOOKS[hook]
    if is_triton(function):
        return list(function.arg_names[len(own) :])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # A built-in function has no signature to look at.
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [name for name, p in signature.parameters.items() if p.kind in kinds]
    return [name for name in named[_positional(signature, len(own)) :] if name in parameters]


def _positional(signature: inspect.Signature, most: int) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(sum(p.kind in kinds for p in signature.parameters.values()), most)


def _check_function(hook: str, function: Any, parameters: Mapping[str, Any]) -> list[str]:
    if function is None:
        return []
    own = ", ".join(HOOKS[hook])
    if not callable(function) and not is_triton(function):
        raise TypeError(f"{hook} must be a function ({own}) or None, got {function!r}")
    names = parameters_of(hook, function, parameters)
    missing = [name for name in names if name not in parameters]
    if missing:
        raise TypeError(f"{hook} takes {missing} after ({own}), which parameters={sorted(parameters)} do not hold")
    if not is_triton(function):
        try:
            inspect.signature(function).bind(*HOOKS[hook], **{name: None for name in names})
        except TypeError as error:
            raise TypeError(
                f"{hook} is called with ({own}) and with parameters={sorted(parameters)} that it names, but {error}"
            ) from error
        except ValueError:
            return names
    elif len(function.arg_names) < len(HOOKS[hook]):
        raise TypeError(f"{hook} is a Triton function of {list(function.arg_names)}, expected ({own}) and then parameters")
    return names


def _check_softcap(softcap: Any) -> None:
    if softcap is None:
        return
    if not isinstance(softcap, int | float) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a number or None, got {softcap!r}")
    if not softcap > 0 or not math.isfinite(softcap):
        raise ValueError(f"softcap={softcap} must be positive and finite, or None for none")


def _check_per_head(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [H] or None, got {value!r}")
    if value.ndim != 1 or not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}, expected a number a query head, [H]")


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a dict of names and tensors or numbers, got {parameters!r}")
    for name, value in parameters.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | int | float):
            raise TypeError(f"parameters[{name!r}] must be a tensor or a number under a name, got {type(value).__name__}")
