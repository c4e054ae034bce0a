"""What the attention function of `attn_implementation="fastattn"` counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class InterfaceCounters:
    """Calls of the attention function, one a layer and forward, since `reset()`; those in compiled graphs do not count.

    Attributes:
        kernels: calls that ran our kernels, by backend.
        fallbacks: calls that ran Transformers' attention instead, by reason; one is that ours would not be quicker.
        batches: forwards of Transformers' own continuous batching, replays of its CUDA graphs too, by what they did and
            whether our kernels read pages in place or keys of windows that were gathered.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Count from zero."""
        self.kernels.clear()
        self.fallbacks.clear()
        self.batches.clear()


# The registry of attention functions is one a process, and so are its counters.
counters = InterfaceCounters()
