"""`AdapterStacks`: LoRA layers with several adapters, each layer's stacked into one, for decode steps that are recorded.

A launch takes one A and one B for each weight. Those of several adapters are copied beside each other, and copied anew
before each call, so that no change between calls is missed. They take as much memory as the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.kernels.layer.lora import MOST_RANK, Adapter, Members
from hf_fastattn.patches.modules.lora_modules import NumberedAdapter, adapted_parameters
from hf_fastattn.patches.modules.product_layers import product_layers


class AdapterStacks:
    """The stacks of a model's LoRA layers.

    Args:
        model: patched, with fused layers.
        names: adapters that rows choose from, by number; None for the active ones, which all rows have and all are number 0.
    """

    def __init__(self, model: Any, names: tuple[str, ...] | None) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._stacks: dict[int, Adapter] = {}
        for linear, members in _members(model, names):
            if _fits(members):
                self._stacks[id(linear)] = self._stacked([adapter for _, adapter in members], [one for one, _ in members])

    def get(self, linear: nn.Module) -> Adapter | None:
        """The adapters of a layer, as one; None where they cannot be stacked."""
        return self._stacks.get(id(linear))

    def refresh(self) -> None:
        """Copy all A and B, on the current stream."""
        if self._targets:
            with torch.inference_mode(False), torch.no_grad():
                torch._foreach_copy_(self._targets, self._sources)

    @staticmethod
    def are_wanted(model: Any, names: tuple[str, ...] | None) -> bool:
        """Whether a layer has more than one adapter, or rows choose theirs."""
        return any(names is not None or len(members) > 1 for _, members in _members(model, names))

    @staticmethod
    def bytes_needed(model: Any, names: tuple[str, ...] | None) -> int:
        """What the stacks would take."""
        held = [one for _, members in _members(model, names) if _fits(members) for _, one in members]
        return sum(tensor.numel() * tensor.element_size() for one in held for tensor in (one.a, one.b))

    def _stacked(self, adapters: Sequence[Adapter], numbers: Sequence[int]) -> Adapter:
        ranks = [one.a.shape[0] for one in adapters]
        first, total = adapters[0], sum(ranks)
        device = first.a.device

        def by_row(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            every = [value for value, rank in zip(values, ranks, strict=True) for _ in range(rank)]
            return torch.tensor(every, dtype=dtype, device="cpu").to(device)

        with torch.inference_mode(False):
            a, b = first.a.new_empty(total, first.a.shape[1]), first.b.new_empty(first.b.shape[0], total)
            members = Members(by_row([one.scale for one in adapters], torch.float32), by_row(numbers, torch.int32))
        self._targets += [*a.split(ranks), *b.split(ranks, 1)]
        self._sources += [*(one.a for one in adapters), *(one.b for one in adapters)]
        return Adapter(a, b, 1.0, members)


@dataclass(frozen=True)
class TokenAdapters:
    """Which adapters the tokens of a forward have.

    Attributes:
        numbers: `[T]` int32, of each token's adapter in `names`, or -1; 0 for all where `names` is None.
        names: adapters that rows choose from; None if all have the active ones.
        stacks: of both kinds, if there are any.
    """

    numbers: Tensor
    names: tuple[str, ...] | None = None
    stacks: AdapterStacks | None = None


def add_by_row(y: Tensor, x: Tensor, members: Sequence[NumberedAdapter], numbers: Tensor) -> Tensor:
    """`y: [T, N]` and what the adapter of each token's number makes of `x: [T, K]`, added in the dtype of y as by PEFT."""
    for number, one in members:
        added = functional.linear(functional.linear(x.to(one.a.dtype), one.a), one.b) * one.scale
        y = torch.where((numbers == number)[:, None], y + added.to(y.dtype), y)
    return y


def _members(model: Any, names: tuple[str, ...] | None) -> list[tuple[nn.Module, list[NumberedAdapter]]]:
    """The LoRA layers whose products are ours, and their adapters."""
    found = []
    for linear in product_layers(model._fastattn.decoder(model), model.device, model.lm_head):
        held = adapted_parameters(linear, model.device, DTYPES, names)
        if held is not None and held.members:
            found.append((linear, held.members))
    return found


def _fits(members: Sequence[NumberedAdapter]) -> bool:
    """Whether a kernel takes the adapters as one."""
    return len({one.a.dtype for _, one in members}) == 1 and sum(one.a.shape[0] for _, one in members) <= MOST_RANK
