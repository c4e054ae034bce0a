"""torchao's quantised weights, tensor subclasses in plain linear layers: what they hold, and which only launch.

The package is not imported: classes are known by their names.
"""

from __future__ import annotations

from typing import Any

from hf_fastattn.kernels.quantised.weights import QuantisedWeight, RowInts, TiledInts

PACKAGE = "torchao."
TILED, BYTES = "Int4TilePackedTo4dTensor", "Int8Tensor"
# Weights whose products are operations of PyTorch on the tensors inside, and nothing else: a graph may hold them.
LAUNCHING = frozenset((
    TILED, BYTES, "Int4Tensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor",
    "IntxUnpackedToInt8Tensor", "Float8Tensor",
))  # fmt: skip


def is_launching(weight: Any) -> bool:
    """Whether a product with the weight does nothing but launch kernels."""
    return _is_of(weight, LAUNCHING)


def inner_tensors(weight: Any) -> list[Any]:
    """The tensors that a weight consists of."""
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def parts_of(weight: Any) -> tuple[Any, ...]:
    """What a recorded product with the weight depends on: where its tensors lie, and how they are to be read."""
    tensors = inner_tensors(weight)
    places = ((part.data_ptr(), part.dtype, part.device, part.shape, part.stride()) for part in tensors)
    return type(weight).__name__, str(weight.__tensor_flatten__()[1]), *places


def weight_of(weight: Any, columns: int) -> QuantisedWeight | None:
    """A weight that is multiplied with numbers: tinygemm's tiles, or integers with a scale for each row; None of any other.

    Args:
        columns: of the layer; weights that are padded beyond them are not known.
    """
    if not _is_of(weight, (TILED, BYTES)) or weight.act_pre_scale is not None:
        return None
    size = list(weight.block_size)
    if _is_of(weight, (TILED,)):
        if weight.qdata.ndim != 4 or size[:-1] != [1] or weight.shape[1] != columns:
            return None
        found = TiledInts(weight.qdata, weight.scale_and_zero, weight.shape[0], size[-1])
        return found if found.columns == columns else None
    if weight.act_quant_kwargs is not None or weight.qdata.ndim != 2 or size != [1, columns]:
        return None
    return RowInts(weight.qdata, weight.scale.flatten())


def _is_of(weight: Any, names: Any) -> bool:
    kind: Any = type(weight)
    return kind.__name__ in names and kind.__module__.startswith(PACKAGE)
