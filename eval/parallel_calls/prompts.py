"""Prompts that begin alike: samples of one, questions about documents, prompts within prompts, turns of a chat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn.generation.shared_prompt import tokens_in_common
from hf_fastattn.pages.prefix_index import rows_of_tokens

# Rows of each prompt of `fours`.
FOUR = 4
# Of the rows of `groups`, the share that each of three documents has.
GROUPS = (2, 1, 1)
# Documents of `nested`, each after the same system prompt of half the length.
DOCUMENTS = 4


@dataclass(frozen=True)
class Prompts:
    """Rows that begin alike.

    Args:
        kind: one of `choices.PARALLEL`, but for `turns`.
        rows: how many.
        length: tokens that they have in common, in all levels.
        own: most tokens of a row after these; samples, and those of `fours`, have none.
        vocabulary: of the model.
    """

    kind: str
    rows: int
    length: int
    own: int
    vocabulary: int

    def tokens(self, number: int) -> list[Tensor]:
        """The rows of call `number`; another number has other questions about the same documents."""
        documents = self._documents()
        if self.kind in ("samples", "fours"):
            return documents
        made = torch.Generator().manual_seed(1000 + number)
        lengths = torch.randint((self.own + 1) // 2, self.own + 1, (self.rows,), generator=made).tolist()
        return [
            torch.cat((document, torch.randint(1, self.vocabulary, (count,), generator=made)))
            for document, count in zip(documents, lengths, strict=True)
        ]

    def _documents(self) -> list[Tensor]:
        """What each row begins with."""
        made = torch.Generator().manual_seed(1)

        def drawn(count: int) -> Tensor:
            return torch.randint(1, self.vocabulary, (count,), generator=made)

        if self.kind == "fours":
            texts = [drawn(self.length) for _ in range(-(-self.rows // FOUR))]
            return [texts[row // FOUR] for row in range(self.rows)]
        if self.kind == "groups":
            texts = [drawn(self.length) for _ in GROUPS]
            places = [place for place, share in enumerate(GROUPS) for _ in range(share)]
            return [texts[places[row * len(places) // self.rows]] for row in range(self.rows)]
        if self.kind == "nested":
            system, texts = drawn(self.length // 2), [drawn(self.length - self.length // 2) for _ in range(DOCUMENTS)]
            # No neighbours: rows of a document stand apart.
            return [torch.cat((system, texts[row % DOCUMENTS])) for row in range(self.rows)]
        return [drawn(self.length)] * self.rows


def left_padded(rows: list[Tensor], device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of these rows."""
    columns = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), columns, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, columns - len(row) :], mask[place, columns - len(row) :] = row, 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def most_to_compute(rows: list[Tensor], page_size: int) -> int:
    """Tokens that have to be computed where each whole page is computed once; equal rows are one."""
    distinct = list({tuple(row.tolist()): row.numpy() for row in rows}.values())
    return sum(map(len, distinct)) - tokens_in_common(rows_of_tokens(distinct, page_size), page_size)
