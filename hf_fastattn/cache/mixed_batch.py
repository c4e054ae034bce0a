"""`MixedBatch`: a forward of one new token of some rows, and behind them pieces of the prompts of others.

Norms and products take the tokens of both together, so that weights are read once; attention is one call for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.kernels.variants.prepared import PreparedVariant


@dataclass(frozen=True)
class MixedBatch(Batch):
    """`steps` and `pieces` as one batch.

    Attributes:
        steps: one new token a row.
        pieces: tokens of prompts, packed.
        whole: where the tokens of both are written.
    """

    steps: Batch = field(kw_only=True)
    pieces: Batch = field(kw_only=True)
    whole: Batch = field(kw_only=True)

    @staticmethod
    def of(steps: Batch, pieces: Batch, device: torch.device) -> MixedBatch:
        """Both batches are `static()` ones, on `device`."""
        first, second = steps.on(device), pieces.on(device)
        slots = {window: torch.cat((first.slots[window], second.slots[window])) for window in first.slots}
        rows, tokens = steps.rows + pieces.rows, steps.tokens + pieces.tokens
        # Nobody reads by it.
        tensors = BatchTensors(slots, {}, first.seq_lens, second.cu_seqlens)
        whole = Batch(rows, tokens, pieces.max_query_len, False, steps.options, _tensors={device: tensors})
        return MixedBatch(
            rows, tokens, pieces.max_query_len, False, steps.options, _tensors=whole._tensors,
            steps=steps, pieces=pieces, whole=whole,
        )  # fmt: skip

    def forget_tables(self) -> None:
        """Those of its parts too."""
        super().forget_tables()
        self.steps.forget_tables()
        self.pieces.forget_tables()

    def rope_append(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
        window: int | None, **norms: Any,
    ) -> Tensor:  # fmt: skip
        """As of any batch, of all tokens."""
        return self.whole.rope_append(q, k, v, cos, sin, k_pages, v_pages, window, **norms)

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, *, scale: float,
        variant: PreparedVariant | None = None,
    ) -> Tensor:  # fmt: skip
        """As of any batch, of the tokens of rows and then of those of prompts."""
        first, second = q[: self.steps.tokens], q[self.steps.tokens :]
        options: dict[str, Any] = {"scale": scale, "variant": variant}
        return torch.cat(
            (
                self.steps.attend(first, k_pages, v_pages, window, **options),
                self.pieces.attend(second, k_pages, v_pages, window, **options),
            )
        )
