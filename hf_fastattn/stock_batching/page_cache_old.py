"""`StockPages` for Transformers before 5.23, whose cache has a tensor for each layer of a group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_manager import SlidingAttentionCacheAllocator

from hf_fastattn.stock_batching.page_cache import FULL, SLIDING, StockPages
from hf_fastattn.stock_batching.steps import fill_ring


class RingAllocator(SlidingAttentionCacheAllocator):
    """A sliding group whose decode steps read its ring of pages through the block table."""

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        """The request's row: its ring's pages, and the slot of the new token."""
        fill_ring(block_table, self.block_table[request_id], past_length, self.sliding_window, self.block_size)


class OldPages(StockPages):
    """Groups of as many layers each share the tensors; a block is a page of each layer of one group."""

    def __init__(self, config: Any, continuous_batching_config: Any, *args: Any, **kwargs: Any) -> None:
        columns = continuous_batching_config.max_blocks_per_request
        self._has_rings = SLIDING in group_layers_by_attn_type(config)[1]
        if self._has_rings:
            # Transformers would warn that it takes none, and take none.
            continuous_batching_config.max_blocks_per_request = 0
        super().__init__(config, continuous_batching_config, *args, **kwargs)
        if self._has_rings:
            for manager in self.group_cache_managers:
                if isinstance(manager, SlidingAttentionCacheAllocator):
                    manager.__class__ = RingAllocator
            # One column for the new token's slot.
            self.max_blocks_per_request = columns + 1 if columns else 0

    def limit_scheduler(self, scheduler: Any) -> None:
        """Keep requests that would fill all columns from decoding with the block table."""
        if self._has_rings and self.max_blocks_per_request:
            scheduler.max_decode_fast_path_length -= self.block_size

    def group_of(self, layer_idx: int) -> tuple[int, str]:
        """Which block table and indices are the layer's, and whether it is full or sliding."""
        return self.layer_index_to_group_indices[layer_idx][0], FULL if self.sliding_windows[layer_idx] == 1 else SLIDING

    def pages_of(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, `[N, P, G, D]` views."""
        _, place = self.layer_index_to_group_indices[layer_idx]
        shape = (-1, self.block_size, self.num_key_value_heads, self.head_dim)
        return self.key_cache[place].view(shape), self.value_cache[place].view(shape)

    def trash_of(self, layer_idx: int) -> int:
        """A slot of the layer's pages that is written but never read."""
        return self.write_trash_index

    def gather(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and copy out what their windows show."""
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        held = PagedAttentionCache.update(self, key, value, layer_idx, **indices)
        return tuple(x.transpose(0, 1)[None] for x in held)  # type: ignore[return-value]
