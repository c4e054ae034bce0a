"""Sliding windows over documents, and batches of them as left-padded rows.

As in Transformers' guide to perplexity: the document is cut into spans of `stride` tokens, each scored once, with up to
`context - stride` tokens before it as context. The first windows of a document have less, so rows are ragged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.texts import Document

# Shorter windows would leave nothing to prefill before the tokens that are appended.
MIN_TOKENS = 16
# Tokens that are kept, by tokenizer and text: more than the held-out texts have.
MOST_KEPT = 2**20
_kept: dict[tuple[str, int, str], list[int]] = {}


@dataclass(frozen=True)
class Window:
    """Tokens of one document; the last `scored` of them are predicted.

    `document` counts documents, `start` is the place of the first scored token in it.
    """

    document: int
    start: int
    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class WindowBatch:
    """Windows as rows, padded on the left: `ids` and bool `mask` `[B, S]`."""

    windows: tuple[Window, ...]
    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """`[B, S]` position of each token in its row; 0 for padding."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    @property
    def each_alone(self) -> list[WindowBatch]:
        """Every row as a batch of its own, as wide as this one."""
        one = range(len(self.ids))
        return [WindowBatch(self.windows[row : row + 1], self.ids[row : row + 1], self.mask[row : row + 1]) for row in one]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row."""
        return int(self.mask.sum(1).min())


def cut(index: int, tokens: Sequence[int], context: int, stride: int, bos: int | None) -> list[Window]:
    """The windows of one document, each beginning with `bos` if there is one."""
    head = [] if bos is None else [bos]
    windows = []
    for start in range(0, len(tokens), stride):
        stop = min(start + stride, len(tokens))
        first = max(stop - (context - len(head)), 0)
        ids = [*head, *tokens[first:stop]]
        # Without a bos nothing predicts the first token.
        scored = min(stop - start, len(ids) - 1)
        if len(ids) >= MIN_TOKENS:
            windows.append(Window(index, start, tuple(ids), scored))
    return windows


def choose(
    texts: Sequence[Document], tokenizer: Any, *, context: int, stride: int, count: int | None, seed: int
) -> list[Window]:
    """At most `count` windows of all documents, drawn and ordered by `seed`.

    Raises:
        ValueError: `stride` is not below `context`, or the text is too short for one window.
    """
    if not 0 < stride < context:
        raise ValueError(f"stride={stride} must lie between 1 and context - 1 = {context - 1}")
    found: list[Window] = []
    for index, document in enumerate(texts):
        found += cut(index, _tokens(document.text, tokenizer), context, stride, tokenizer.bos_token_id)
    if not found:
        raise ValueError(f"the text has no window of at least {MIN_TOKENS} tokens")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[:count]]


def _tokens(text: str, tokenizer: Any) -> Sequence[int]:
    """Of a text; kept, since a table of faults asks for those of the same texts a hundred times."""
    key = tokenizer.name_or_path, len(tokenizer), text
    if key not in _kept:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if sum(map(len, _kept.values())) + len(tokens) > MOST_KEPT:
            return tokens
        _kept[key] = tokens
    return _kept[key]


def batches(windows: Sequence[Window], size: int, pad: int) -> list[WindowBatch]:
    """The windows in their order, `size` rows at a time."""
    made = []
    for first in range(0, len(windows), size):
        rows = tuple(windows[first : first + size])
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[index, width - len(row.ids) :] = True
        made.append(WindowBatch(rows, ids, mask))
    return made


def joined_rows(parts: Sequence[WindowBatch]) -> WindowBatch:
    """Batches of one width as one, their rows in order."""
    windows = tuple(window for part in parts for window in part.windows)
    return WindowBatch(windows, torch.cat([part.ids for part in parts]), torch.cat([part.mask for part in parts]))
