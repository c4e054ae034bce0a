"""`LayerVariants`: which attention variant each layer of a patched model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from hf_fastattn.kernels.variants.prepared import PreparedVariant, same_variant
from hf_fastattn.kernels.variants.variant import FUNCTIONS, Variant

READS_ROW = "an attention variant reads the row"


class StockAttentionError(RuntimeError):
    """A call needs Transformers' own attention, which does not compute the model's variant."""


class Rotates(Protocol):
    """A rotation whose frequencies may depend on the length of rows."""

    def reach(self, length: int) -> None: ...


@dataclass(frozen=True, eq=False)
class LayerVariants:
    """The variants of one model, by layer; false if no layer has one.

    Attributes:
        by_layer: of the layers that have one.
        rotations: by the model's own frequencies, of variants with RoPE inside.
        all_inside: no layer takes queries and keys that the model has rotated.
    """

    by_layer: Mapping[int, PreparedVariant] = field(default_factory=dict)
    rotations: Sequence[Rotates] = ()
    all_inside: bool = False

    def __bool__(self) -> bool:
        return bool(self.by_layer)

    @property
    def reads_row(self) -> bool:
        """Whether the result of a row depends on its place in the batch: then equal rows are not computed once for all."""
        return any(variant.reads_row for variant in self.by_layer.values())

    @property
    def causal(self) -> bool:
        """Whether no query sees a key after itself: only then a prompt may be computed in pieces."""
        return all(variant.variant.causal for variant in self.by_layer.values())

    @property
    def rotates(self) -> bool:
        """Whether the cache of a layer keeps keys before RoPE, which Transformers' attention could not use."""
        return any(variant.rotates for variant in self.by_layer.values())

    def reach(self, length: int) -> None:
        """Rows will have at most `length` tokens; see `patches.attention.inside.ModelRotation.reach`."""
        for rotation in self.rotations:
            rotation.reach(length)

    @property
    def needs_gradients(self) -> bool:
        """Whether something that a variant reads is being trained."""
        return any(variant.needs_gradients for variant in self.by_layer.values())

    def refresh(self) -> None:
        """Look at what functions refer to now; see `PreparedVariant.refresh`."""
        for variant in self._distinct:
            variant.refresh()

    def fingerprint(self) -> tuple[Any, ...]:
        """What launches that were recorded depend on; see `PreparedVariant.fingerprint`. Which layers, never changes."""
        return tuple(variant.fingerprint() for variant in self._distinct)

    @property
    def _distinct(self) -> list[PreparedVariant]:
        return list({id(variant): variant for variant in self.by_layer.values()}.values())

    def same_as(self, asked: Mapping[int, Variant]) -> bool:
        """Whether these are the variants that somebody asks for, by layer."""
        layers = {*self.by_layer, *asked}
        held = {index: variant.asked for index, variant in self.by_layer.items()}
        return all(same_variant(held.get(index), asked.get(index)) for index in layers)

    def describe(self) -> list[str]:
        """A line for each run of layers with the same variant."""
        lines = []
        order = list(enumerate(sorted(self.by_layer)))
        for (text, _), places in groupby(order, lambda place: (describe(self.by_layer[place[1]]), place[1] - place[0])):
            run = [index for _, index in places]
            layers = f"layer {run[0]}" if len(run) == 1 else f"layers {run[0]} to {run[-1]}"
            lines.append(f"{layers}: {text}")
        return lines

    def refuse(self, reason: str) -> None:
        """Nothing without a variant; with one, an error that says why Transformers' attention would have to run.

        Raises:
            StockAttentionError: a layer has a variant.
        """
        if self.by_layer:
            layer = min(self.by_layer)
            raise StockAttentionError(
                f"layer {layer} has an attention variant ({describe(self.by_layer[layer])}), which only pages "
                f"compute, but this call needs Transformers' attention: {reason}; change the call, or unpatch() the model"
            )


def asked_variants(variant: Any, layers: list[int]) -> dict[int, Variant]:
    """The variants of the layers, from what `patch` was given: one for all, or a function of the layer's index.

    Raises:
        TypeError: it is neither, or the function gives something else.
    """
    if variant is None or isinstance(variant, Variant):
        return {} if variant is None else dict.fromkeys(layers, variant)
    if not callable(variant):
        raise TypeError(
            f"variant must be a hf_fastattn.Variant, or a function from layer indices to Variants; got {variant!r}"
        )
    return _asked_by_layer(variant, layers)


def _asked_by_layer(variant: Callable[[int], Any], layers: list[int]) -> dict[int, Variant]:
    found = {}
    for index in layers:
        given = variant(index)
        if given is not None and not isinstance(given, Variant):
            raise TypeError(f"variant({index}) gives {given!r}, expected a hf_fastattn.Variant, or None for plain attention")
        if given is not None:
            found[index] = given
    return found


def describe(prepared: PreparedVariant) -> str:
    """A variant in a line: its functions by name, and what else differs from plain attention."""
    variant = prepared.asked
    parts = [f"{hook}={_name(getattr(variant, hook))}" for hook in FUNCTIONS if getattr(variant, hook) is not None]
    parts += [] if variant.normalizer == "softmax" else [f"normalizer={variant.normalizer}"]
    parts += [f"{name}={getattr(variant, name)}" for name in ("window", "softcap") if getattr(variant, name) is not None]
    parts += [name for name in ("sinks", "alibi") if getattr(variant, name) is not None]
    parts += [] if variant.causal else ["causal=False"]
    parts += ["rope=inside"] if variant.rope == "inside" else []
    parts += ["reads the row, so that nothing is shared between rows"] if prepared.reads_row else []
    return ", ".join(parts) or "plain attention"


def _name(function: Any) -> str:
    name: str = getattr(function, "__name__", None) or type(function).__name__
    return name
