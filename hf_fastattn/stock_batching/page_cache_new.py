"""`StockPages` for Transformers 5.23 and later, whose cache is one tensor that allocators cut into pages."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import SlidingAttentionCacheAllocator

from hf_fastattn.stock_batching.page_cache import LAYER, SLIDING, StockPages
from hf_fastattn.stock_batching.steps import fill_ring


class RingAllocator(SlidingAttentionCacheAllocator):
    """A sliding group whose decode steps read its ring of pages through the block table."""

    supports_block_table = True

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        """The request's row: its ring's pages, and the slot of the new token."""
        per_block = self.block_physical_stride // self.tokens_per_page
        pages = [block * per_block for block in self.block_table[request_id]]
        fill_ring(block_table, pages, past_length, self.sliding_window, self.tokens_per_page)

    def get_cache_for_block_table(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """`[N, P, G, D]` pages of keys and of values."""
        return self._kv_page_views[layer_idx]


class NewPages(StockPages):
    """Pages of the layers of a kind lie interleaved in one tensor; entries of block tables are multiples of their stride."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ring = self.cache_allocators.get(SLIDING)
        if ring is not None:
            ring.__class__ = RingAllocator
            if self.max_blocks_per_request > 0:
                # One column for the new token's slot.
                self.max_blocks_per_request += 1
            self.max_decode_fast_path_length = self._infer_max_decode_fast_path_length()

    def _infer_max_decode_fast_path_length(self) -> int:
        length = super()._infer_max_decode_fast_path_length()
        ring = self.cache_allocators.get(SLIDING)
        return length if ring is None else max(length - ring.tokens_per_page, 0)

    def group_of(self, layer_idx: int) -> tuple[int, str]:
        """Which block table and indices are the layer's, and whether it is full or sliding."""
        allocator = self.layer_to_allocator[layer_idx]
        return allocator.index, allocator.layer_type

    def pages_of(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, `[N, P, G, D]` views."""
        return self.layer_to_allocator[layer_idx]._kv_page_views[layer_idx]

    def trash_of(self, layer_idx: int) -> int:
        """A slot of the layer's pages that is written but never read."""
        return self.layer_to_allocator[layer_idx].write_trash_index

    def gather(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and copy out what their windows show."""
        # The stock update edits the arguments.
        return PagedAttentionCache.update(self, key, value, layer_idx, dict(kwargs))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as the layer's attention takes them; `kwargs` gets the layer, for the attention function."""
        layer = kwargs[LAYER] = self.layer(key_states, value_states, layer_idx, kwargs)
        return layer.key, layer.value
