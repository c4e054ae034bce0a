"""bitsandbytes' linear layers with weights in 4 bits: what they hold, and whether a call does nothing but launch.

The package is not imported: modules are known by the names of their classes and by what their forward refers to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.kernels.quantised.weights import BlockCodes, Nested

MODULE = "bitsandbytes.nn.modules"
FOUR_BITS = "Params4bit"
# What the forward of `Linear4bit` refers to, in bitsandbytes 0.43 to 0.50.
FORWARD_NAMES = frozenset((
    "fix_4bit_weight_quant_state_from_module", "weight", "quant_state", "device", "type", "support_avx512bf16_for_cpu",
    "training", "requires_grad", "getattr", "_convert_weight_packed_for_cpu", "data", "compute_type_is_set",
    "set_compute_type", "dtype", "compute_dtype", "to", "bias", "bnb", "matmul_4bit", "t", "enable_optimized_cpu",
    "ipex_linear_is_set", "set_ipex_linear", "is_xpu_available",
))  # fmt: skip


def is_four_bits(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of bitsandbytes' `Linear4bit`, as it is known here."""
    kind: Any = type(module)
    return kind.__module__ == MODULE and _is_known(kind.forward)


@functools.lru_cache(maxsize=16)
def _is_known(forward: Callable[..., Any]) -> bool:
    own = (forward.__module__, forward.__qualname__) == (MODULE, "Linear4bit.forward")
    return own and FORWARD_NAMES.issuperset(forward.__code__.co_names)


def block_codes(module: nn.Module) -> BlockCodes | None:
    """The weight of a `Linear4bit`; None before it is quantised, and where it lies in another order."""
    weight = module._parameters.get("weight")
    if not is_four_bits(module) or weight is None or not is_params(weight):
        return None
    state = vars(weight).get("quant_state")
    if state is None or getattr(state, "packing_format_for_cpu", False) or len(state.shape or ()) != 2:
        return None
    rows, columns = state.shape
    codes: Any = weight
    codes = codes.data
    if type(codes) is not Tensor or not codes.is_contiguous() or (rows, columns) != (
        vars(module)["out_features"], vars(module)["in_features"],
    ):  # fmt: skip
        return None
    nested = None
    if state.nested:
        of = state.state2
        if of.blocksize != 256:
            return None
        nested = Nested(of.absmax, of.code, state.offset)
    # FSDP has the bytes stored as numbers of another type.
    return BlockCodes(
        codes.view(torch.uint8).flatten(), rows, columns, state.quant_type, state.blocksize, state.absmax, nested
    )


def computes_as(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a `Linear4bit` multiplies x of this dtype as it is, or in fp32, where a kernel sums anyway."""
    held = vars(module)
    if not held.get("compute_type_is_set") and dtype is not torch.float16:
        return True
    return held["compute_dtype"] in (None, dtype, torch.float32)


def parts_of(weight: Any) -> tuple[Any, ...]:
    """What a recorded call of the layer depends on, beside what `Module` says: where the parts of a `Params4bit` lie."""
    state = vars(weight).get("quant_state")
    if state is None:
        return (id(weight),)
    tensors = [
        weight,
        state.absmax,
        state.code,
        *((state.offset, state.state2.absmax, state.state2.code) if state.nested else ()),
    ]
    return (state.quant_type, state.blocksize, tuple(state.shape), *(part.data_ptr() for part in tensors))


def is_params(weight: Any) -> bool:
    """Whether it is the weight of a `Linear4bit`."""
    kind: Any = type(weight)
    return kind.__module__ == MODULE and kind.__name__ == FOUR_BITS
