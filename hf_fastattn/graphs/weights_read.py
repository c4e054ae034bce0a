"""Which weights of a decoder keys and values are computed with: a change of the others makes none out of date.

Of embeddings a prompt reads the rows of its own tokens; what comes after the last layer's attention is for logits alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_fastattn.cache.embedded_rows import EmbeddedRows
from hf_fastattn.graphs.module_checks import PLAIN
from hf_fastattn.kernels.layer.weight_sum_host import host_sum, row_sums

# A user's in its place may read more than the rows of its tokens.
_LOOK_UP = nn.Embedding.forward


def weights_read(decoder: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, but for embeddings whose rows are looked at and what no key is computed with.

    What is left out in one place and held in another one is among them.
    """
    return list({id(tensor): tensor for tensor in weights_of(decoder, _unread(decoder))}.values())


def weights_of(decoder: nn.Module, without: frozenset[tuple[int, str]] = frozenset()) -> Iterator[Tensor]:
    """Parameters and buffers, those that are there twice twice.

    Args:
        without: modules that are not looked into, by the address of the one that holds each and its name there.
    """
    stack = [decoder]
    while stack:
        module = stack.pop()
        for held in (module._parameters, module._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None and tensor.numel())
        for name, child in module._modules.items():
            if child is not None and (id(module), name) not in without:
                stack.append(child)


def _unread(decoder: nn.Module) -> frozenset[tuple[int, str]]:
    found = {(id(decoder), "norm")}
    if embeddings_by_rows(decoder) is not None:
        found.add((id(decoder), "embed_tokens"))
    layers = decoder._modules.get("layers")
    if isinstance(layers, nn.ModuleList) and len(layers):
        last = layers[-1]
        # One that is there several times computes what keys of later layers depend on.
        if sum(layer is last for layer in layers) == 1:
            found.add((id(last), "mlp"))
    return frozenset(found)


def embeddings_by_rows(decoder: nn.Module) -> Tensor | None:
    """The embeddings of a decoder, if they lie in the host's memory and all that is done with them is to look up rows.

    None of what PEFT or others have wrapped, and of what scales its rows to a largest norm: it writes to them.
    """
    module: Any = vars(decoder)["_modules"].get("embed_tokens")
    if type(module) is not nn.Embedding or nn.Embedding.forward is not _LOOK_UP or "forward" in vars(module):
        return None
    weight: Any = module._parameters["weight"]
    if module.max_norm is not None or type(weight) not in PLAIN or weight.device.type != "cpu" or not weight.numel():
        return None
    words = weight.is_contiguous() and weight.data_ptr() % 8 == 0 and weight.shape[1] * weight.element_size() % 8 == 0
    return weight if words and len(module._parameters) == 1 and not module._buffers else None


class RowSums:
    """The sums of rows of embeddings, of all of them while none has changed."""

    def __init__(self) -> None:
        # A sum over all, and those of the rows.
        self._all: tuple[list[int], NDArray[np.int64]] | None = None

    def of(self, weight: Tensor, tokens: NDArray[np.int64] | None) -> EmbeddedRows:
        """The sums of the rows of these tokens as they are, or of all.

        Args:
            weight: `[n, hidden]`, of `embeddings_by_rows`.
            tokens: in any order, and repeated; those without a row are left to whoever looks them up.
        """
        count = len(weight)
        if tokens is not None:
            is_there = np.zeros(count, np.bool_)
            is_there[tokens[(tokens >= 0) & (tokens < count)]] = True
            once = np.flatnonzero(is_there)
            return EmbeddedRows(once, row_sums(weight, once), count)
        every, whole = np.arange(count), host_sum([weight])
        if self._all is None or self._all[0] != whole or len(self._all[1]) != count:
            self._all = whole, row_sums(weight, every)
        return EmbeddedRows(every, self._all[1], count)
