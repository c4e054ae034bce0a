"""Faults in what recorded steps of the device's loop read: below the modules, where hooks do not reach.

They are part of what a step launches, so that they are recorded with it, and hold in every replay; the layers stay fused,
the loop stays on the device. Each is quiet: what is read instead is there, and no NaN.

    step-page     The newest full pages of the first and of the last row are exchanged in the table that attention reads. A
                  row alone has the page before it there once more.
    step-slot     Keys and values of new tokens are written one slot further on, but for the last slot of a page; their own
                  holds zeros.
    step-scale    Scores are multiplied by 1.03, in prompts too.
    step-length   Rows are read as if they were one key shorter: a token does not see its own.
    step-rope     The second row's queries and keys, or those of a row alone, are turned by the angles of its first step, in
                  all steps.
    step-sampler  Where the k likeliest tokens may be drawn, k is half as large again.
    step-expert   The second of a token's experts is taken for the first, and the first for the second; in prompts too.
    step-prefix   The first group of rows that read a prefix once has one row too many, which then reads another's prefix.
    step-suffix   The prefix of the first group is taken for a page longer, once all of its rows have that page: they read
                  their first row's, and their suffixes begin a page late.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.patching import find_model

SCALE_FACTOR, MORE_TOKENS = 1.03, 1.5


@contextmanager
def planted_in_steps(model: Any, fault: str, count: Callable[[], None]) -> Iterator[None]:
    """Plant `fault` in a patched model's recorded steps; `count` is called whenever it changes what is launched.

    Raises:
        ValueError: the model has no experts for `step-expert`.
    """
    with ExitStack() as stack:
        for patched in _PLANT[fault](find_model(model), count):
            stack.enter_context(patched)
        yield


def _in_batches(change: Callable[[Any, BatchTensors, int], BatchTensors | None]) -> Any:
    """A fault in the tensors of a step's batch; `change` gives None where there is nothing to change."""

    def plant(model: Any, count: Callable[[], None]) -> list[Any]:
        # Not before: it imports Triton.
        from hf_fastattn.loop.step_inputs import StepInputs

        make = StepInputs.batch

        def batch(self: StepInputs, key: Any, options: Any) -> Batch:
            made = make(self, key, options)
            held = made.on(self.tokens.device)
            changed = change(model, held, key.rows)
            if changed is None:
                return made
            count()
            return replace(made, _tensors={self.tokens.device: changed})

        return [mock.patch.object(StepInputs, "batch", batch)]

    return plant


def _pages_exchanged(model: Any, held: BatchTensors, rows: int) -> BatchTensors | None:
    size, lengths = model._fastattn.runtime.groups.page_size, held.seq_lens
    order = torch.arange(rows, device=lengths.device)
    # The last row that takes part: the host does not wait to know it.
    last = torch.where(lengths > 0, order, 0).amax()
    pair = torch.stack((torch.zeros_like(last), last))
    column = ((lengths[pair].long() - 1) // size - 1).clamp(min=0)
    tables = {}
    for window, table in held.page_tables.items():
        entries = table[pair, column].flip(0)
        if rows == 1:
            before = table[pair, (column - 1).clamp(min=0)]
            # Layers with a window may have let go of it.
            entries = torch.where(before < 0, entries, before)
        tables[window] = table.clone().index_put_((pair, column), entries)
    return replace(held, page_tables=tables)


def _slots_one_on(model: Any, held: BatchTensors, rows: int) -> BatchTensors:
    groups = model._fastattn.runtime.groups
    size, slots = groups.page_size, {}
    for window, own in held.slots.items():
        right = own.long()
        shifts = (right >= 0) & (right % size < size - 1)
        # A row that shifts nothing clears what one that does will: there is no other place that may be written to.
        left = torch.where(shifts, right, torch.where(shifts, right, -1).amax())
        for layer in range(model.config.get_text_config(decoder=True).num_hidden_layers):
            for pages in groups.group(window).storage.pages(layer) or ():
                flat = pages.view(-1, *pages.shape[2:])
                flat[left.clamp(min=0)] = torch.where(left[:, None, None] >= 0, 0.0, flat[left.clamp(min=0)])
        slots[window] = (right + shifts).to(own.dtype)
    return replace(held, slots=slots)


def _one_key_short(model: Any, held: BatchTensors, rows: int) -> BatchTensors:
    return replace(held, seq_lens=(held.seq_lens - 1).clamp(min=0))


def _scaled(model: Any, count: Callable[[], None]) -> list[Any]:
    names = (name for name in model._fastattn.modules)
    modules = [module for module in map(model.get_submodule, names) if hasattr(module, "k_proj")]
    for _ in modules:
        count()
    return [mock.patch.object(module, "scaling", module.scaling * SCALE_FACTOR) for module in modules]


def _stale_angles(model: Any, count: Callable[[], None]) -> list[Any]:
    # Not before: it imports Triton.
    from hf_fastattn.loop.device_state import DeviceState

    arguments = DeviceState.arguments

    def stale(self: DeviceState, rows: int, place: Any = None) -> dict[str, Any]:
        given = arguments(self, rows, place)
        step = self.tensors(rows, False).step.long()
        # The row's number in the call: it may stand elsewhere on the device.
        stale_row = (self.numbers[:rows, None] == min(1, rows - 1)).long()
        count()
        return {**given, "position_ids": given["position_ids"] - stale_row * (step - 1)}

    return [mock.patch.object(DeviceState, "arguments", stale)]


def _more_tokens(model: Any, count: Callable[[], None]) -> list[Any]:
    # Not before: it imports Triton.
    from hf_fastattn.loop.device_state import DeviceState

    begin = DeviceState.begin

    def changed(self: DeviceState, request: Any, *given: Any) -> None:
        begin(self, request, *given)
        if request.do_sample and request.choice.top_k:
            self.params[1].fill_(float(int(request.choice.top_k * MORE_TOKENS)))
            count()

    return [mock.patch.object(DeviceState, "begin", changed)]


def _experts_exchanged(model: Any, count: Callable[[], None]) -> list[Any]:
    blocks = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    routers = {type(block.gate) for block in blocks if hasattr(block, "gate") and hasattr(block, "experts")}
    if not routers:
        raise ValueError(f"a {model.config.model_type} has no experts to take for each other")

    def exchanged(pairs: Tensor) -> Tensor:
        return torch.cat((pairs[:, :2].flip(1), pairs[:, 2:]), 1).contiguous()

    def in_torch(kind: Any) -> Any:
        forward = kind.forward

        # By its name it is the class's own, so that layers are taken for what they were.
        @functools.wraps(forward)
        def changed(self: Any, *given: Any, **named: Any) -> Any:
            logits, weights, chosen = forward(self, *given, **named)
            count()
            return logits, weights, exchanged(chosen)

        return mock.patch.object(kind, "forward", changed)

    planted = [in_torch(kind) for kind in routers]
    if model.device.type != "cpu":
        # Not before: it imports Triton.
        from hf_fastattn.patches.fused import mixture

        route = mixture.route

        def in_kernels(x: Tensor, weight: Tensor, top_k: int, **named: Any) -> Any:
            routing = route(x, weight, top_k, **named)
            count()
            ranks = None if routing.ranks is None else exchanged(routing.ranks)
            return routing._replace(chosen=exchanged(routing.chosen), ranks=ranks)

        planted.append(mock.patch.object(mixture, "route", in_kernels))
    return planted


def _row_too_many(model: Any, count: Callable[[], None]) -> list[Any]:
    # Not before: it imports Triton.
    from hf_fastattn.loop.step_inputs import StepInputs

    make = StepInputs.batch

    def batch(self: StepInputs, key: Any, options: Any) -> Batch:
        made = make(self, key, options)
        if made.shared is None:
            return made
        count()
        starts = made.shared.group_starts.clone()
        # Not past the end of the group after it, of which there may be none.
        starts[0, 1] = torch.minimum(starts[0, 1] + 1, starts[0, 2])
        return replace(made, shared=replace(made.shared, group_starts=starts))

    return [mock.patch.object(StepInputs, "batch", batch)]


def _page_too_long(model: Any, count: Callable[[], None]) -> list[Any]:
    # Not before: it imports Triton.
    from hf_fastattn.loop.step_inputs import StepInputs

    make, size = StepInputs.batch, model._fastattn.runtime.groups.page_size

    def batch(self: StepInputs, key: Any, options: Any) -> Batch:
        made = make(self, key, options)
        # Where prefixes lie in each other, one of them would end after those within it.
        if made.shared is None or len(made.shared.prefix_lens) > 1:
            return made
        count()
        lens, starts = made.shared.prefix_lens, made.shared.group_starts[0]
        lengths = made.on(self.tokens.device).seq_lens
        # The first group that shares anything: rows between groups are in groups of no prefix.
        first = (lens[0] > 0).int().argmax().view(1)
        begin, end = starts.gather(0, first), starts.gather(0, first + 1)
        order = torch.arange(len(lengths), device=lengths.device)
        inside = (order >= begin) & (order < end) & (lengths > 0)
        long = torch.where(inside, lengths, lengths.amax()).amin() > lens[0].gather(0, first) + size
        changed = lens.clone()
        changed[0] += torch.where((torch.arange(lens.shape[1], device=lens.device) == first) & long & (lens[0] > 0), size, 0)
        return replace(made, shared=replace(made.shared, prefix_lens=changed))

    return [mock.patch.object(StepInputs, "batch", batch)]


_PLANT: dict[str, Callable[[Any, Callable[[], None]], list[Any]]] = {
    "step-page": _in_batches(_pages_exchanged),
    "step-slot": _in_batches(_slots_one_on),
    "step-scale": _scaled,
    "step-length": _in_batches(_one_key_short),
    "step-rope": _stale_angles,
    "step-sampler": _more_tokens,
    "step-expert": _experts_exchanged,
    "step-prefix": _row_too_many,
    "step-suffix": _page_too_long,
}
