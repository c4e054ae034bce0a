"""`PreparedVariant`: a `Variant` looked at for heads of one size, and compiled for the devices that it runs on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from hf_fastattn.kernels.variants.captured import captured, same_objects
from hf_fastattn.kernels.variants.hooks import CompiledVariant
from hf_fastattn.kernels.variants.trace import TracedHook, VariantError, trace
from hf_fastattn.kernels.variants.variant import FUNCTIONS, Variant, is_triton, rotation_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_fastattn.kernels.variants.rotation import RotaryFrequencies


class PreparedVariant:
    """A variant whose functions were traced once: what they read is known, and mistakes in them have been found.

    Args:
        variant: as the user wrote it; the reference calls its functions.
        heads: query heads, for the tensors that have an entry for each.
        head_dim: of the heads.
        device: where attention runs at first, and where what the functions read has to be.
        translate: the Triton kernels will run it there; else the reference.
        asked: as the user wrote it, if `variant` has more, a rotation by the model's frequencies.

    Raises:
        VariantError: a function cannot be used; which operation, in which line, and what would work.
    """

    def __init__(
        self,
        variant: Variant,
        heads: int,
        head_dim: int,
        device: torch.device,
        translate: bool,
        asked: Variant | None = None,
    ) -> None:
        self.variant, self.asked = variant, asked or variant
        self._rotation = rotation_of(variant)
        self._head_dim, self._device, self._translate = head_dim, device, translate
        self._compiled: dict[Any, CompiledVariant] = {}
        _check_heads(variant, heads)
        self.tensors: tuple[Tensor, ...]
        self.reads_row: bool
        self.identity: str
        self._captured = self._refers_to()
        self._look()

    def _look(self) -> None:
        if self._translate:
            self._compile(self._device)
            return
        traced = _traced(self.variant, self._head_dim, self._device)
        self.tensors = tuple(tensor for hook in traced for tensor in hook.tensors.values())
        self.reads_row = any(hook.reads_row for hook in traced)
        self.identity = _identity(self.variant, traced)

    def _refers_to(self) -> list[Any]:
        """What the functions refer to now; `@triton.jit` functions get what they read as parameters."""
        variant = self.variant
        functions = [getattr(variant, hook) for hook in FUNCTIONS]
        return [*variant.parameters.values(), *(value for function in functions for value in captured(function))]

    def refresh(self) -> None:
        """Look again if a function's names stand for other tensors, numbers or functions than before.

        Raises:
            VariantError: what they stand for now cannot be used.
        """
        now = self._refers_to()
        if not same_objects(self._captured, now):
            self._compiled.clear()
            self._captured = now
            self._look()

    @property
    def window(self) -> int | None:
        """Keys a query sees, itself included, if the variant has a window."""
        return self.variant.window

    @property
    def rotates(self) -> bool:
        """Whether its transforms rotate queries and keys (`rope="inside"`), so that the cache keeps keys before RoPE."""
        return getattr(self.variant, "rope", "model") == "inside"

    @property
    def rotation(self) -> RotaryFrequencies | None:
        """What rotates both queries and keys inside, if the kernels know it."""
        return self._rotation

    @property
    def needs_gradients(self) -> bool:
        """Whether something that the functions read is being trained."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def compiled(self, device: torch.device) -> CompiledVariant:
        """It for the Triton kernels on `device`, compiled anew if what it reads lies, or looks, otherwise than before.

        Raises:
            VariantError: it cannot be translated, or reads a tensor of another device.
        """
        held = self._compiled.get((device, *map(_layout, self.tensors)))
        return self._compile(device) if held is None else held

    def fingerprint(self) -> tuple[Any, ...]:
        """What launches that were recorded depend on: how it is computed, and where what it reads lies."""
        return (self.identity, *((tensor.data_ptr(), *_layout(tensor)) for tensor in self.tensors))

    def _compile(self, device: torch.device) -> CompiledVariant:
        # Not before: it imports Triton.
        from hf_fastattn.kernels.variants.compiled import compile_variant

        compiled = compile_variant(self.variant, self._head_dim, device)
        # Tensors of the user's own Triton functions are among them.
        self.tensors, self.reads_row, self.identity = compiled.tensors or (), compiled.reads_row, compiled.identity
        self._compiled[(device, *map(_layout, self.tensors))] = compiled
        return compiled


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _traced(variant: Variant, head_dim: int, device: torch.device) -> list[TracedHook]:
    found = []
    for hook, function in variant.functions().items():
        if is_triton(function):
            raise VariantError(
                f"{hook} is a @triton.jit function, which PyTorch cannot run; give a PyTorch function, or move the model "
                "to a CUDA device before patch()"
            )
        traced = trace(hook, function, head_dim, device)
        _check_draws(traced)
        found.append(traced)
    return found


def _check_draws(traced: TracedHook) -> None:
    """The order in which pairs of query and key are computed means nothing, so random numbers have none to follow."""
    for node in traced.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            line = f" ({node.meta['stack_trace']})" if node.meta.get("stack_trace") else ""
            raise VariantError(
                f"{traced.hook}{line} draws random numbers by {node.target}; make a table of them outside, and index it"
            )


def _check_heads(variant: Variant, heads: int) -> None:
    for name in ("sinks", "alibi"):
        value = getattr(variant, name)
        if value is not None and value.shape[0] != heads:
            raise VariantError(f"{name} has {value.shape[0]} entries, but the layer has {heads} query heads; give [{heads}]")


def _identity(variant: Variant, traced: Iterable[TracedHook]) -> str:
    graphs = [(hook.hook, _code(hook.graph), [_layout(tensor) for tensor in hook.tensors.values()]) for hook in traced]
    text = f"{graphs}{variant.normalizer}{variant.window}{variant.causal}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def same_variant(one: Variant | None, other: Variant | None) -> bool:
    """Whether two are made of the same functions, tensors and numbers."""
    if one is None or other is None:
        return one is other
    fields = (field.name for field in dataclasses.fields(Variant))
    return all(_same(getattr(one, name), getattr(other, name)) for name in fields)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if one is other:
        return True
    return isinstance(one, int | float | str) and type(one) is type(other) and one == other
