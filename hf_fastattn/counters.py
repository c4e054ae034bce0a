"""What one `generate()` call did: the counters that tests, evaluations and users read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class CallCounters:
    """Counts of one call, or of the forwards since it.

    Attributes:
        forwards: forwards of the base decoder on the paged path.
        fallbacks: forwards or calls that ran Transformers' own path instead, by reason.
        prompt_tokens: tokens computed by paged forwards with more than one new token a row.
        tokens_reused: prompt tokens that lay in pages of other rows or of earlier calls, and were not computed.
        prefix_pages_evicted: pages that `prefix_cache` let go of to make room.
        prefix_unused: calls whose prompts `prefix_cache` could not serve, by reason.
        pages_allocated: pages taken from the pool.
        pages_shared: pages that a fork gave a further owner instead of copying them.
        pages_copied: pages copied before a write, since others held them too.
        graphs_captured: decode steps recorded as CUDA graphs.
        graphs_replayed: forwards that were a replay of one.
        appends_captured: forwards of several tokens a row (prompts, drafts to verify) recorded as CUDA graphs.
        appends_replayed: forwards that were a replay of one of those.
        fast_loops: `generate()` calls whose loop ran on the device.
        uncaptured: decode steps launched layer by layer although graphs are on, by reason.
        not_looped: `generate()` calls whose loop was Transformers' own, by reason; a nested call counts too.
        requests_batched: requests of `generate_batch()` and its managers that were served to their end in running batches.
        requests_preempted: of these, those that made way for older ones when pages ran out, and were computed again.
        batch_steps: decode steps of running batches.
        prompt_pieces_mixed: pieces of prompts that such steps computed beside their rows.
        adapters_fused: LoRA layers computed by the launch of the product that they change, in forwards that were launched
            or recorded; a replay repeats them uncounted.
        quantised_products: layers with quantised weights that our kernels multiplied with, counted likewise.
    """

    forwards: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens_reused: int = 0
    prefix_pages_evicted: int = 0
    prefix_unused: Counter[str] = field(default_factory=Counter)
    pages_allocated: int = 0
    pages_shared: int = 0
    pages_copied: int = 0
    graphs_captured: int = 0
    graphs_replayed: int = 0
    appends_captured: int = 0
    appends_replayed: int = 0
    fast_loops: int = 0
    uncaptured: Counter[str] = field(default_factory=Counter)
    not_looped: Counter[str] = field(default_factory=Counter)
    requests_batched: int = 0
    requests_preempted: int = 0
    batch_steps: int = 0
    prompt_pieces_mixed: int = 0
    adapters_fused: int = 0
    quantised_products: int = 0

    def count_products(self, adapters: int, quantised: int) -> None:
        """Count what the products of a forward took in."""
        self.adapters_fused += adapters
        self.quantised_products += quantised
