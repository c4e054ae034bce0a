"""`CountedReasons`: what a patched model counts, and why calls do as Transformers does, each reason logged once."""

from __future__ import annotations

import logging

from hf_fastattn.counters import CallCounters
from hf_fastattn.hints import with_hint
from hf_fastattn.layer_variants import LayerVariants

logger = logging.getLogger("hf_fastattn")


class CountedReasons:
    """Counters of the call under way, or of the last one.

    Args:
        variants: of attention, by layer, which Transformers' own attention does not compute.
    """

    def __init__(self, variants: LayerVariants) -> None:
        self.variants = variants
        self.counters = CallCounters()
        self._logged: set[str] = set()

    def count_forward(self, fallback: str | None, prompt_tokens: int) -> None:
        """Count a forward of the base decoder."""
        if fallback is not None:
            self.count_fallback(fallback)
            return
        self.counters.forwards += 1
        self.counters.prompt_tokens += prompt_tokens

    def note(self, reason: str) -> None:
        """Log once why a call is served in another way than it could be."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("hf_fastattn: %s", with_hint(reason))

    def count_not_looped(self, reason: str) -> None:
        """Count, and log once, why a call's loop is Transformers' own."""
        self.counters.not_looped[reason] += 1
        self.note(f"Transformers' own loop runs: {reason}")

    def count_fallback(self, reason: str, level: int = logging.WARNING) -> None:
        """Count, and log once, that Transformers' own attention runs.

        Raises:
            StockAttentionError: a layer has a variant, which that does not compute.
        """
        self.count_unshared(reason, level)
        if self.variants:
            self.variants.refuse(with_hint(reason))

    def count_unshared(self, reason: str, level: int = logging.WARNING) -> None:
        """Count, and log once, that something is done as Transformers does, over pages all the same."""
        self.counters.fallbacks[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.log(level, "hf_fastattn does here as Transformers does: %s", with_hint(reason))
