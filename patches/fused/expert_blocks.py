"""Mixtures of experts of layers that are called: the block's forward, on our kernels inside a paged forward.

A hybrid's layer is called as Transformers wrote it where its linear attention has to be; what comes after that is a block
of experts as in other families.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.fused.experts import held_in
from hf_fastattn.patches.modules.module_state import ModuleState, original_forward, patched_forward
from hf_fastattn.patches.modules.plain_copies import STATE, plain_class

if TYPE_CHECKING:
    # They import Triton, or what imports them.
    from hf_fastattn.patches.fused.products import Products
    from hf_fastattn.runtime import Runtime


def block_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """What the original gives, `[B, S, H]`; by our kernels inside `blocks_with`, if the block holds what they take."""
    state: ModuleState | None = vars(self).get(STATE)
    products = None if state is None else _products_for(self, state, hidden_states)
    kinds = None if products is None else products.names.mixture
    held = None if kinds is None else held_in(self, kinds, hidden_states.device, hidden_states.dtype)
    if products is None or held is None or held.group is not None:
        out: Tensor = original_forward(self)(hidden_states)
        return out
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.mixture import mixed

    return mixed(held, hidden_states.flatten(0, 1), products).view_as(hidden_states)


BLOCK_FORWARDS = (patched_forward(block_forward),)


def is_known_block(module: Any, family: Family) -> bool:
    """Whether a module is an expert block of the family, with nothing in its forward's place."""
    kinds = None if family.blocks is None else family.blocks.mixture
    if kinds is None or type(module).__name__ != kinds.block or not {"forward", "_hf_hook"}.isdisjoint(vars(module)):
        return False
    forward: Any = type(module).forward
    return str(forward.__module__).startswith("transformers.")


@contextmanager
def blocks_with(runtime: Runtime, products: Products) -> Iterator[None]:
    """Blocks that are called inside, on this thread, compute with `products`."""
    runtime.block_products = products
    try:
        yield
    finally:
        runtime.block_products = None


def _products_for(block: Any, state: ModuleState, states: Tensor) -> Products | None:
    products: Products | None = state.runtime.block_products
    if products is None or torch.compiler.is_compiling() or not state.runtime.turn.is_mine():
        return None
    changed = plain_class(type(block)).forward is not state.class_forward
    fits = states.shape[:-1] == products.leading and states.device == products.device
    return products if fits and not changed else None
