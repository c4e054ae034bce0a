"""The forward of pieces of prompts, of several requests, packed one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.batching.recorded_piece import recorded_piece
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.patches.fused.forward import fused_forward, step_logits


def compute_pieces(
    model: Any, pages: SlotPages, slots: Sequence[int], before: Sequence[int], pieces: Sequence[NDArray[np.int64]],
    ends: Sequence[int], device: torch.device, size: int = 0,
) -> Tensor | None:  # fmt: skip
    """Append pieces of prompts to the slots that hold what comes before them.

    Args:
        slots: of each piece, which hold `before` tokens.
        pieces: `[n]` tokens each.
        ends: which of the pieces end a prompt.
        size: tokens that a single piece may be recorded with; 0 if it is not worth it.

    Returns:
        `[ends, V]` logits after these; None if no prompt has ended.
    """
    decoder, cache = model._fastattn.decoder(model), pages.cache
    counts = [len(piece) for piece in pieces]
    hidden = None
    if size and len(pieces) == 1:
        hidden = recorded_piece(model, pages, slots[0], before[0], pieces[0], size, device)
    if hidden is None:
        positions = [np.arange(first, first + count) for first, count in zip(before, counts, strict=True)]
        packed = torch.from_numpy(np.stack((np.concatenate(pieces), np.concatenate(positions))))
        packed = packed.to(device, non_blocking=True)
        # Transformers passes a 4-D mask on as it is; our attention ignores it.
        mask = torch.empty(1, 1, 1, 1, device=device)
        with cache.using(pages.batch(slots, before, counts)):
            hidden = fused_forward(
                decoder, cache, input_ids=packed[:1], inputs_embeds=None, position_ids=packed[1:], attention_mask=mask,
                use_cache=True, return_dict=True,
            ).last_hidden_state  # fmt: skip
    pages.counters.forwards += 1
    pages.counters.prompt_tokens += sum(counts)
    if not ends:
        return None
    last = [end - 1 for end in accumulate(counts)]
    index = torch.tensor([last[place] for place in ends], dtype=torch.int64).to(device, non_blocking=True)
    # The last layers, and the output layer, may be on other devices.
    return step_logits(model, hidden[0].to(device).index_select(0, index)).to(device)
