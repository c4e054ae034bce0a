"""`ModelState`: everything that the keys and values of a token depend on besides the tokens before it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.graphs.fingerprint import PLAIN, SCALARS, fingerprint_of
from hf_fastattn.graphs.module_checks import has_foreign_hooks, submodules
from hf_fastattn.kernels.layer import weight_sum_reference


class ModelState:
    """Names the state of a decoder by its modules, options and adapters, and by a sum over the bits of all its weights.

    Args:
        checked: the weights are looked at, which reads them once; else the owner has promised not to change them.
        triton: on CUDA devices, by one launch.
    """

    def __init__(self, checked: bool, triton: bool = True) -> None:
        self._checked, self._triton = checked, triton and importlib.util.find_spec("triton") is not None
        self._places: Any = None
        # Where the tensors are that the kernel reads, by device. No tensor is held: a model may give its weights up.
        self._tables: list[Tensor] = []

    def drop(self) -> None:
        """Hold no memory."""
        self._places, self._tables = None, []

    def why_not(self, decoder: nn.Module) -> str | None:
        """Why a change of what the decoder computes could go unnoticed."""
        for module in (decoder, *submodules(decoder)):
            if has_foreign_hooks(vars(module)):
                return f"a {type(module).__name__} has hooks, which may do something else in each call"
        for tensor in _weights(decoder) if self._checked else ():
            if type(tensor) not in PLAIN:
                return f"a parameter is a {type(tensor).__name__}, whose change could go unnoticed"
            if tensor.device.type == "meta":
                return "the weights are offloaded"
        return None

    def of(self, decoder: nn.Module, device: torch.device) -> tuple[Any, ...]:
        """The state as values to compare; waits for the device, once."""
        parts = (*fingerprint_of(decoder, device).parts, *_options(decoder))
        if not self._checked:
            return (parts,)
        weights = list({id(tensor): tensor for tensor in _weights(decoder)}.values())
        return parts, self._sums(weights)

    def _sums(self, weights: list[Tensor]) -> tuple[int, ...]:
        in_launches = [tensor for tensor in weights if self._triton and _is_whole(tensor)]
        places = [(tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device) for tensor in in_launches]
        if self._places != places:
            devices = dict.fromkeys(tensor.device for tensor in in_launches)
            self._tables = [_table([tensor for tensor in in_launches if tensor.device == device]) for device in devices]
            self._places = places
        with torch.inference_mode(False), torch.no_grad():
            sums = [_launched(table) for table in self._tables]
            sums += weight_sum_reference.weight_sum(tensor for tensor in weights if not (self._triton and _is_whole(tensor)))
            return tuple(value for one in sums for value in one.flatten().tolist())


def _table(tensors: list[Tensor]) -> Tensor:
    # Not before: it imports Triton.
    from hf_fastattn.kernels.layer import weight_sum

    return weight_sum.table_of(tensors, tensors[0].device)


def _launched(table: Tensor) -> Tensor:
    from hf_fastattn.kernels.layer import weight_sum

    return weight_sum.weight_sum(table, torch.empty(weight_sum.PROGRAMS, dtype=torch.int64, device=table.device))


def _options(decoder: Any) -> Iterator[Any]:
    """What the decoder itself and its configuration say; some modules ask the latter in each forward."""
    yield from (value for value in vars(decoder).values() if type(value) in SCALARS)
    config = decoder.config
    # Entries of Transformers' own say how something is computed, and not what.
    yield from (f"{name}={value!r}" for name, value in vars(config).items() if not name.startswith("_"))


def _weights(decoder: nn.Module) -> Iterator[Tensor]:
    for module in (decoder, *submodules(decoder)):
        for held in (module._parameters, module._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None and tensor.numel())


def _is_whole(tensor: Tensor) -> bool:
    """Whether the kernel takes the tensor: on a CUDA device, in one piece of whole words."""
    size = tensor.numel() * tensor.element_size()
    return tensor.is_cuda and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and size % 16 == 0
