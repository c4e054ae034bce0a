"""`AnyProducts`: the operations of a forward, by our kernels or by PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from hf_fastattn.patches.fused.plain_products import PlainProducts as PlainProducts

if TYPE_CHECKING:
    # It imports Triton.
    from hf_fastattn.patches.fused.products import Products as Products

AnyProducts: TypeAlias = "Products | PlainProducts"
