"""The hook in Transformers' continuous batching: a patched model's managers are ours where they can be."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from hf_fastattn.batching.choice import choice_of
from hf_fastattn.batching.manager import FastBatchingManager

# Where Transformers keeps a manager for the next session.
KEPT = "_cached_continuous_batching_manager"


class FastBatchingMixin:
    """Goes in front of a model's class, as `FastGenerationMixin` does."""

    _fastattn: Any
    generation_config: Any

    @torch.no_grad()
    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """Transformers' `init_continuous_batching`; `generate_batch` and the context manager come here too."""
        held = getattr(self, KEPT, None)
        if isinstance(held, FastBatchingManager):
            return held
        if self._fastattn.runtime.config.streaming is not None:
            raise ValueError("generate_batch and streaming: batches of requests keep all tokens; patch without streaming")
        config = self.generation_config if generation_config is None else generation_config
        batching = continuous_batching_config
        if batching is None:
            batching = getattr(config, "continuous_batching_config", None)
        if not isinstance(batching, ContinuousBatchingConfig):
            batching = ContinuousBatchingConfig()
        reason: Any = "a manager of Transformers' own was kept"
        if self._fastattn.runtime.turn.is_mine():
            # Its thread would wait for this one, which waits for its requests.
            reason = "it was asked for inside a generate() of the same model"
        elif not isinstance(held, ContinuousBatchingManager):
            reason = "there is no generation_config" if config is None else choice_of(self, config, batching)
        if isinstance(reason, str):
            self._fastattn.runtime.count_not_looped(f"continuous batching: {reason}")
            return super().init_continuous_batching(  # type: ignore[misc]
                generation_config=generation_config, continuous_batching_config=continuous_batching_config,
                workload_hints=workload_hints,
            )  # fmt: skip
        if config.eos_token_id is None:
            # As Transformers does: no token ends a request.
            config.eos_token_id = -1
        return FastBatchingManager(
            reason, self, generation_config=config, continuous_batching_config=batching, workload_hints=workload_hints
        )


def forget_manager(model: Any) -> None:
    """A model that is not patched any more keeps no manager of ours."""
    held = vars(model).get(KEPT)
    if isinstance(held, FastBatchingManager):
        held.destroy()
        delattr(model, KEPT)
