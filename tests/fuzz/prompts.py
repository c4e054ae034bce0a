"""Prompt batches of every padding, from plain data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tools.models import VOCAB, image_batch


def prompt_batch(prompt: dict[str, Any], family: str, model: Any) -> dict[str, Tensor]:
    """The tensors that `generate()` is given."""
    if prompt.get("kind") == "images":
        return image_batch(family, prompt["seed"])
    rows, length = prompt["rows"], prompt["length"]
    generator = torch.Generator().manual_seed(prompt["seed"])
    ids = torch.randint(1, VOCAB - 8, (rows, length), generator=generator)
    if prompt.get("equal"):
        ids[1::2] = ids[:1]
    mask = _mask(prompt.get("pad", "none"), rows, length, generator)
    if prompt.get("equal"):
        mask[1::2] = mask[:1]
    ids = ids * mask
    batch = {"input_ids": ids} if prompt.get("no_mask") else {"input_ids": ids, "attention_mask": mask}
    if prompt.get("positions"):
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + prompt["seed"] % 3
    if prompt.get("token_types"):
        batch["token_type_ids"] = torch.zeros_like(ids)
    if prompt.get("embeds"):
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    return batch


def _mask(pad: str, rows: int, length: int, generator: torch.Generator) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        size = int(torch.randint(0, length, (), generator=generator))
        if pad in ("left", "hidden_row"):
            mask[row, :size] = 0
        elif pad == "right" and size:
            mask[row, -size:] = 0
        elif pad == "holes":
            mask[row, :-1] = (torch.rand(length - 1, generator=generator) < 0.7).long()
        elif pad == "columns":
            mask[row, : length // 2] = 0
    if pad == "columns":
        mask[:, length // 3] = 0
        mask[:, -1] = 1
    if pad == "hidden_row":
        mask[-1] = 0
    return mask
