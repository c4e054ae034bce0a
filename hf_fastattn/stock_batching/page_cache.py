"""`StockPages`: Transformers' paged cache of continuous batching, whose layers are read where their pages lie.

A forward's layers come in order, so a layer that is not behind the last one of its group begins a new forward. (Nothing
else tells forwards apart: one that is recorded as a CUDA graph has the very tensors of the one before it, and must make
from them again, inside the graph, what its layers share.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hf_fastattn.stock_batching.attention import PagedLayer
from hf_fastattn.stock_batching.steps import PagedStep, decode_step, gathered_step, prompt_step

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace

FULL, SLIDING = "full_attention", "sliding_attention"
# Where `update` leaves the layer for the attention function, among the arguments that a model hands on.
LAYER = "fastattn_layer"
# What a forward read, for the counters.
IN_PLACE, GATHERED = "pages in place", "windows gathered"


class StockPages(PagedAttentionCache, ABC):
    """What all supported versions of Transformers have in common; `page_cache_new` and `page_cache_old` know their own.

    Attributes:
        reads: what layers read since `take_reads`: `IN_PLACE`, `GATHERED`.
        unread_mask: of four dimensions, which models hand on as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: dict[int, tuple[int, PagedStep]] = {}
        self._workspaces: dict[int, Workspace] = {}
        self._read_by: dict[tuple[bool, bool], str] = {}
        self.reads: set[str] = set()
        self.unread_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    # ---- what differs between versions -------------------------------------------------------------------------

    @abstractmethod
    def group_of(self, layer_idx: int) -> tuple[int, str]:
        """Which block table and indices are the layer's, and whether it is full or sliding."""

    @abstractmethod
    def pages_of(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, `[N, P, G, D]` views."""

    @abstractmethod
    def trash_of(self, layer_idx: int) -> int:
        """A slot of the layer's pages that is written but never read."""

    @abstractmethod
    def gather(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[1, G, T, D]`, and copy out what their windows show: `[1, G, L, D]`."""

    def limit_scheduler(self, scheduler: Any) -> None:
        """Where rings of pages need a column of the block table: keep requests that leave none from decoding with it."""

    # ---- one layer ---------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def layer(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> PagedLayer:
        """The layer in the forward that is under way.

        Args:
            key: `[1, G, T, D]` new keys; `value` likewise. Written to the pages by the attention that follows.
            kwargs: what Transformers hands to its attention function.
        """
        group, kind = self.group_of(layer_idx)
        held = self._steps.get(group)
        if held is None or layer_idx <= held[0]:
            step = self._step(layer_idx, group, kind, kwargs)
        else:
            step = held[1]
        if step.slots is None:
            key, value = self.gather(key, value, layer_idx, kwargs)
        self._steps[group] = (layer_idx, step)
        copies = step.slots is None and kwargs["read_index"][group].numel()
        self.reads.add(GATHERED if copies else IN_PLACE)
        return PagedLayer(step, key, value, *self.pages_of(layer_idx), self._workspaces)

    def _step(self, layer_idx: int, group: int, kind: str, kwargs: dict[str, Any]) -> PagedStep:
        keys, page_size = _of_kind(kwargs["cu_seq_lens_k"], kind), self.pages_of(layer_idx)[0].shape[1]
        if kwargs.get("block_table") is not None:
            return decode_step(kwargs["block_table"][group], keys, page_size, self.trash_of(layer_idx), kind == SLIDING)
        queries = kwargs["cu_seq_lens_q"]
        lengths = (_most(kwargs, "q"), _of_kind(_most(kwargs, "k"), kind))
        read, written = kwargs["read_index"][group], kwargs["write_index"][group]
        if kind == SLIDING:
            tokens = read.shape[0] or written.shape[0]
            return gathered_step(tokens, queries, keys, lengths, self.config.sliding_window)
        return prompt_step(read, written, queries, keys, lengths, page_size)

    # ---- for the counters --------------------------------------------------------------------------------------

    def take_reads(self, batch: dict[str, Any]) -> str:
        """What a forward over `batch` did; of the replay of a graph, what the forward did that was recorded."""
        is_decode = batch["block_table"] is not None or _most(batch, "q") == 1
        kind = (batch["block_table"] is not None, bool(batch["read_index"][0].numel()))
        seen, self.reads = self.reads, set()
        if seen:
            self._read_by[kind] = GATHERED if GATHERED in seen else IN_PLACE
        return f"{'decode' if is_decode else 'prompts'}: {self._read_by.get(kind, 'nothing')}"


def _of_kind(given: Any, kind: str) -> Any:
    """Of one kind of layers; where all are of one kind, some versions hand it over by itself."""
    return given[kind] if isinstance(given, dict) else given


def _most(given: dict[str, Any], of: str) -> Any:
    """The most queries or keys of a row, by its name in this version or in older ones."""
    name = f"max_length_{of}"
    return given[name] if name in given else given[f"max_seqlen_{of}"]
