"""`ModelState`: everything that the keys and values of a token depend on besides it and the tokens before it."""

from __future__ import annotations

import functools
import importlib.util
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PretrainedConfig

from hf_fastattn.cache.embedded_rows import EmbeddedRows
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.module_checks import PLAIN, SCALARS, has_foreign_hooks, submodules
from hf_fastattn.graphs.seen_modules import SWITCHED, Same, Seen, look
from hf_fastattn.graphs.weights_read import RowSums, embeddings_by_rows, weights_of, weights_read
from hf_fastattn.kernels.layer import weight_sum_reference
from hf_fastattn.kernels.layer.weight_sum_host import host_sum, sum_of_words, whole_words

# Attributes that every module has, which the fingerprint looks at, and ours.
OWN = frozenset(vars(nn.Module())) | {"_fastattn"}


class ModelState:
    """Names the state of a decoder by its modules, options and adapters, and by a sum over the bits of its weights.

    Those weights are not read that no key and no value depends on; of embeddings on the host only the rows of the tokens at
    hand, which have sums of their own.

    Args:
        checked: the weights are looked at, which reads them once; else the owner has promised not to write to them.
        triton: on CUDA devices, by one launch.
    """

    def __init__(self, checked: bool, triton: bool = True) -> None:
        self._checked, self._triton = checked, triton and importlib.util.find_spec("triton") is not None
        self._places: Any = None
        # Where the tensors are that the kernel reads, by device. No tensor is held: a model may give its weights up.
        self._tables: list[Tensor] = []
        # Sums under way of what the tables list, or nothing.
        self._begun: list[Launched] = []
        # A look at the model since which the tables list all of its weights.
        self._listed: Seen | None = None
        self._storages: dict[int, Any] = {}
        self._row_sums = RowSums()

    def drop(self) -> None:
        """Hold no memory."""
        self._places, self._tables, self._begun, self._listed = None, [], [], None
        self._row_sums = RowSums()

    def forget(self) -> None:
        """What was begun is out of date."""
        self._begun = []

    def begin(self, decoder: nn.Module, seen: Seen | None = None) -> None:
        """Have the device sum the weights, beside what it does next, for the `of` that follows.

        No user's code may run in between, and after a call without an `of` there has to be a `forget`.

        Args:
            seen: a look at the model as it is, if there was one.
        """
        self.forget()
        if not self._checked or not self._triton:
            return
        seen = look(decoder) if seen is None else seen
        if self._listed is not seen:
            if not seen.answer(("whole", id(decoder)), lambda: any(map(_is_whole, weights_of(decoder)))):
                return
            others = self._place(weights_read(decoder))
            self._listed = None if others or not seen.is_sure else seen
        self._begun = [Launched(table) for table in self._tables]

    def why_not(self, decoder: nn.Module, seen: Seen | None = None, root: nn.Module | None = None) -> str | None:
        """Why a change of what the decoder computes could go unnoticed.

        Args:
            seen: a look at the modules as they are, from `root` down.
            root: the model that the decoder is in, whose hooks may do anything too; the decoder by default.
        """
        root = decoder if root is None else root
        seen = look(root) if seen is None else seen
        return seen.answer(("state", self._checked, id(decoder)), lambda: self._why_not(decoder, root))

    def _why_not(self, decoder: nn.Module, root: nn.Module) -> str | None:
        for module in (root, *submodules(root)):
            if has_foreign_hooks(vars(module)):
                return f"a {type(module).__name__} has hooks, which may do something else in each call"
        for tensor in weights_of(decoder) if self._checked else ():
            if type(tensor) not in PLAIN:
                return f"a parameter is a {type(tensor).__name__}, whose change could go unnoticed"
            if tensor.device.type == "meta":
                return "the weights are offloaded"
        return None

    def of(
        self, decoder: nn.Module, device: torch.device, seen: Seen | None = None, tokens: NDArray[np.int64] | None = None
    ) -> tuple[tuple[Any, ...], EmbeddedRows | None]:
        """The state as values to compare, and rows of embeddings that it says nothing of; waits for the device, once.

        Args:
            seen: a look at the model as it is, if there was one.
            tokens: those whose rows of the embeddings are wanted; all by default.
        """
        seen = look(decoder) if seen is None else seen
        held = seen.answer(("held", id(decoder)), lambda: (_scalars(decoder), _attributes(decoder)))
        parts = fingerprint_of(decoder, device, seen).parts, held
        if not self._checked:
            # Where weights lie does not tell those that were replaced from those that were there before.
            return (*parts, self._storages_of(_weights_once(decoder))), None
        rows = self.rows(decoder, tokens)
        return (*parts, rows is None, self._sums_of([]) if self._listed is seen else self._sums_now(decoder, seen)), rows

    def _sums_now(self, decoder: nn.Module, seen: Seen) -> tuple[int, ...]:
        # By their addresses, while a look vouches for these.
        words = seen.answer(("words", id(decoder)), lambda: whole_words(weights_read(decoder))) if seen.is_sure else None
        return self._sums(weights_read(decoder)) if words is None else tuple(sum_of_words(words))

    def rows(self, decoder: nn.Module, tokens: NDArray[np.int64] | None = None) -> EmbeddedRows | None:
        """The rows of the embeddings of these tokens, or of all, as they are; None where the state is of all embeddings."""
        if not self._checked:
            return None
        weight = embeddings_by_rows(decoder)
        return None if weight is None else self._row_sums.of(weight, tokens)

    def _storages_of(self, weights: list[Tensor]) -> tuple[Any, ...]:
        """What is equal for the same storages only: while a state holds them weakly, no other one has their address."""
        known, self._storages = self._storages, {}
        for tensor in weights:
            if type(tensor) not in PLAIN:
                self._storages[-id(tensor)] = Same(tensor)
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._storages[key] = known[key] if key in known else StorageWeakRef(storage)
        return tuple(self._storages.values())

    def _sums(self, weights: list[Tensor]) -> tuple[int, ...]:
        return self._sums_of(self._place(weights))

    def _sums_of(self, others: list[Tensor]) -> tuple[int, ...]:
        """Of what the tables list, and of other weights."""
        # Sums of other tensors than these were dropped with their tables.
        launched, self._begun = self._begun or [Launched(table) for table in self._tables], []
        with torch.inference_mode(False), torch.no_grad():
            sums = weight_sum_reference.weight_sum(tensor for tensor in others if tensor.device.type != "cpu")
            on_host = host_sum([tensor for tensor in others if tensor.device.type == "cpu"])
            return *on_host, *(value for one in launched for value in one.sums()), *map(int, sums)

    def _place(self, weights: list[Tensor]) -> list[Tensor]:
        """Have the tables list those of these tensors that the kernel takes; gives the others."""
        in_launches = [tensor for tensor in weights if self._triton and _is_whole(tensor)]
        places = [(tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device) for tensor in in_launches]
        if self._places != places:
            devices = dict.fromkeys(tensor.device for tensor in in_launches)
            self._begun, self._listed = [], None
            self._tables = [_table([tensor for tensor in in_launches if tensor.device == device]) for device in devices]
            self._places = places
        listed = set(map(id, in_launches))
        return [tensor for tensor in weights if id(tensor) not in listed]


def _table(tensors: list[Tensor]) -> Tensor:
    # Not before: it imports Triton.
    from hf_fastattn.kernels.layer import weight_sum

    return weight_sum.table_of(tensors, tensors[0].device)


class Launched:
    """Sums under way of what a table lists, on a stream beside the current one, which waits for nothing.

    What was launched before is waited for: it may write to weights.
    """

    def __init__(self, table: Tensor) -> None:
        from hf_fastattn.kernels.layer import weight_sum

        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(table.device):
            stream = _beside(table.device)
            stream.wait_stream(torch.cuda.current_stream())
            # Whoever lets go of the table does not have its memory reused before the launch has read it.
            table.record_stream(stream)
            with torch.cuda.stream(stream):
                sums = torch.empty(weight_sum.PROGRAMS, dtype=torch.int64, device=table.device)
                weight_sum.weight_sum(table, sums)
                self._host = torch.empty(weight_sum.PROGRAMS, dtype=torch.int64, device="cpu", pin_memory=True)
                self._host.copy_(sums, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def sums(self) -> list[int]:
        """The sums, once they are there."""
        self._done.synchronize()
        found: list[int] = self._host.tolist()
        return found


@functools.lru_cache(maxsize=64)
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _scalars(decoder: Any) -> tuple[Any, ...]:
    """What the decoder itself says; of its modules the fingerprint has them."""
    return tuple(value for value in vars(decoder).values() if type(value) in SCALARS)


def _weights_once(decoder: nn.Module) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in weights_of(decoder)}.values())


def _is_whole(tensor: Tensor) -> bool:
    """Whether the kernel takes the tensor: on a CUDA device, in one piece of whole words."""
    size = tensor.numel() * tensor.element_size()
    return tensor.is_cuda and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and size % 16 == 0


def _attributes(decoder: nn.Module) -> tuple[Any, ...]:
    """What else modules hold: configurations, functions, tensors, numbers of NumPy; scalars are in the fingerprint."""
    found: list[Any] = []
    configs: dict[int, Any] = {}
    for module in (decoder, *submodules(decoder)):
        for name, value in vars(module).items():
            if name in OWN or value is None or type(value) in SCALARS:
                continue
            if isinstance(value, PretrainedConfig):
                configs[id(value)] = value
            else:
                found += name, _frozen(value)
    return *found, *(_frozen(vars(config)) for config in configs.values())


def _frozen(value: Any) -> Any:
    """`value` in a form that can be compared: numbers, what tensors hold, containers of these, all else by identity."""
    if value is None or type(value) in SCALARS:
        return value
    if isinstance(value, Number | str):
        return type(value), repr(value)
    if type(value) in PLAIN:
        return str(value.dtype), value.shape, value.tolist() if value.numel() <= 1 else _sum_of(value)
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in value.items() if name not in SWITCHED)
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return _frozen(vars(value)) if isinstance(value, PretrainedConfig) else Same(value)


def _sum_of(tensor: Tensor) -> tuple[int, ...]:
    if tensor.device.type in ("cpu", "meta"):
        return tuple(host_sum((tensor,))) if tensor.device.type == "cpu" else ()
    return tuple(int(one) for one in weight_sum_reference.weight_sum((tensor,)))
