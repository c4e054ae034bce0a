"""Greedy generation by stock and by the patched model: where they part, and whether the exact logits call it a tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.parity_errors import row_errors
from hf_fastattn.eval.accuracy.windows import WindowBatch


@dataclass(frozen=True)
class Path:
    """What `generate()` made of a batch.

    `tokens` `[B * copies, N]`, their raw `logits` `[B * copies, N, V]`, of prompts `ids` and `mask` `[B, S]`. With
    sharing each prompt is given twice; neighbours are copies.
    """

    ids: Tensor
    mask: Tensor
    tokens: Tensor
    logits: Tensor
    copies: int

    def same_tokens(self, other: Path) -> bool:
        """Whether all rows generated what the rows of `other`, which has no copies, did."""
        return torch.equal(self.tokens, other.tokens.repeat_interleave(self.copies, 0))

    def as_batch(self) -> WindowBatch:
        """Prompts and generated tokens as a batch to score."""
        ids, mask = (table.repeat_interleave(self.copies, 0) for table in (self.ids, self.mask))
        shown = torch.ones_like(self.tokens, dtype=torch.bool)
        return WindowBatch((), torch.cat((ids, self.tokens), 1), torch.cat((mask, shown), 1))


@torch.no_grad()
def greedy_path(model: Any, batch: WindowBatch, new_tokens: int, share: bool) -> Path:
    """Generate `new_tokens` greedily after each window."""
    copies = 2 if share else 1
    ids, mask = (table.repeat_interleave(copies, 0).to(model.device) for table in (batch.ids, batch.mask))
    out = model.generate(
        ids,
        attention_mask=mask.long(),
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, ids.shape[1] :].cpu()
    return Path(batch.ids, batch.mask, tokens, torch.stack(out.logits, 1), copies)


def path_errors(ours: Path, stock: Path, exact: Tensor, exact_stock: Tensor) -> dict[str, list[Any]]:
    """Errors of the logits along our own path, and where it leaves stock's, a figure a window.

    Args:
        exact: exact logits along our path, `[rows or B, N, V]`; `exact_stock` along stock's, `[B, N, V]`.

    Returns:
        entries, squares, max and regret as in `logit_errors`; `parted`, the new token at which our tokens leave stock's
        (None if never), and `margin`, by how much the exact logits tell the two tokens there apart.
    """
    names = ("entries", "squares", "max", "regret")
    found: dict[str, list[Any]] = {name: [] for name in (*names, "parted", "margin")}
    for window in range(len(stock.tokens)):
        rows = range(window * ours.copies, (window + 1) * ours.copies)
        exact_rows = [exact[row] if len(exact) == len(ours.tokens) else exact[window] for row in rows]
        pairs = zip(rows, exact_rows, strict=True)
        figures = [row_errors(ours.logits[row].double(), true.double()) for row, true in pairs]
        for name in ("entries", "squares"):
            found[name].append(sum(figure[name] for figure in figures))
        for name in ("max", "regret"):
            found[name].append(max(figure[name] for figure in figures))
        parted, margin = _parting(ours.tokens[rows.start : rows.stop], stock.tokens[window], exact_stock[window])
        found["parted"].append(parted)
        found["margin"].append(margin)
    return found


def _parting(ours: Tensor, stock: Tensor, exact: Tensor) -> tuple[int | None, float]:
    """The first step at which a row of `ours` `[copies, N]` leaves `stock` `[N]`, and the exact margin there."""
    steps = (ours != stock).any(0).nonzero()
    if not len(steps):
        return None, 0.0
    step = int(steps[0])
    row = int((ours[:, step] != stock[step]).nonzero()[0])
    # Up to here the paths agree, so the exact logits are those of either.
    return step, abs((exact[step, stock[step]] - exact[step, ours[row, step]]).item())
