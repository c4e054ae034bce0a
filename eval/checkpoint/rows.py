"""Training batches: rows of text and rows of recall tasks, all determined by (seed, step)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_fastattn.eval.checkpoint.recall import (
    RecallVocabulary,
    insert_pieces,
    needle_pieces,
    text_window,
    variable_chain,
)

Row = tuple[np.ndarray, np.ndarray]  # tokens [T], and whether each is worth predicting [T]
ROW_SHARES = {"text": 0.50, "lookup": 0.18, "needle": 0.15, "copy": 0.09, "variable": 0.08}
TEXT_SHARES = {"prose": 0.30, "docs": 0.25, "code": 0.45}
# Attention over short rows learns to look back sooner: (up to this part of training, {row length: share}).
LENGTHS = (
    (0.22, {512: 1.0}),
    (0.37, {512: 0.2, 2048: 0.8}),
    (1.00, {512: 0.1, 2048: 0.2, 4096: 0.7}),
)


def log_uniform(low: int, high: int, rng: np.random.Generator) -> int:
    """An integer in [low, high], small ones more often."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def text_row(vocabulary: RecallVocabulary, text: np.ndarray, length: int, rng: np.random.Generator) -> Row:
    """Plain text."""
    tokens = np.concatenate([[vocabulary.bos], text_window(text, length - 1, rng)])
    return tokens, np.ones(length, dtype=bool)


def lookup_row(vocabulary: RecallVocabulary, text: np.ndarray, length: int, rng: np.random.Generator) -> Row:
    """Pairs and questions: either all pairs first, or questions among the pairs. Only answers are predicted."""
    first = 1 + int(rng.integers(3))
    slots = (length - first) // 3
    if rng.random() < 0.6:
        pairs = log_uniform(4, slots - 4, rng) if rng.random() < 0.4 else int(rng.integers(4, slots - 4))
        asked = np.arange(slots) >= pairs
    else:
        asked = rng.random(slots) < rng.uniform(0.2, 0.8)
        asked[0] = False
    known = np.cumsum(~asked)
    order = np.where(asked, (rng.random(slots) * known).astype(np.int64), known - 1)
    if rng.random() < 0.5:
        # Without this the first pair was recalled worst: 89% at 3,500 tokens, where all other depths had 100%.
        order[int(np.argmax(asked))] = 0
    keys, values = vocabulary.pick_keys(int(known[-1]), rng), vocabulary.pick_values(int(known[-1]), rng)
    tokens = np.full(length, vocabulary.newline)
    supervised = np.zeros(length, dtype=bool)
    tokens[0], tokens[1:first] = vocabulary.bos, vocabulary.pick_values(first - 1, rng)
    end = first + 3 * slots
    tokens[first + 1 : end : 3], tokens[first + 2 : end : 3] = keys[order], values[order]
    supervised[first + 2 : end : 3] = asked
    return tokens, supervised


def needle_row(vocabulary: RecallVocabulary, text: np.ndarray, length: int, rng: np.random.Generator) -> Row:
    """Needles in text, then a question for each in random order."""
    count = log_uniform(1, min(48, length // 48), rng)
    names, codes = needle_pieces(vocabulary, count, rng)
    pieces = [vocabulary.statement("Remember", [n, *c], ".") for n, c in zip(names, codes, strict=True)]
    asked = rng.permutation(count)
    questions = [(vocabulary.question("Recall", names[i : i + 1]), codes[i].tolist()) for i in asked]
    return _asked_in_text(vocabulary, text, length, pieces, questions, rng)


def variable_row(vocabulary: RecallVocabulary, text: np.ndarray, length: int, rng: np.random.Generator) -> Row:
    """Chains of assignments in text, then a question for the last name of each."""
    hops, count = int(rng.integers(1, 5)), log_uniform(1, min(16, length // 128), rng)
    names, values = vocabulary.pick_keys(count * hops, rng), vocabulary.pick_values(count, rng)
    chains = [variable_chain(vocabulary, names[i::count], values[i]) for i in range(count)]
    pieces = [chain[0][hop] for hop in range(hops) for chain in chains]
    questions = [(vocabulary.question("Trace", chains[i][1][:1]), chains[i][1][1:]) for i in rng.permutation(count)]
    return _asked_in_text(vocabulary, text, length, pieces, questions, rng)


def copy_row(vocabulary: RecallVocabulary, text: np.ndarray, length: int, rng: np.random.Generator) -> Row:
    """Words to copy after a stretch of text, or one segment (words or text) repeated to the end."""
    kind = rng.random()
    if kind < 0.4:
        words = vocabulary.pick_values(log_uniform(4, min(128, length // 8), rng), rng).tolist()
        pieces, questions = [vocabulary.statement("Copy", words)], [(vocabulary.question("Again"), words)]
        return _asked_in_text(vocabulary, text, length, pieces, questions, rng)
    period = log_uniform(8, length // 2, rng)
    words = np.concatenate([vocabulary.keys, vocabulary.values])
    segment = rng.choice(words, period) if kind < 0.7 else text_window(text, period, rng)
    tokens = np.concatenate([[vocabulary.bos], np.resize(segment, length - 1)])
    return tokens, np.arange(length) > period + 1


def _asked_in_text(
    vocabulary: RecallVocabulary,
    text: np.ndarray,
    length: int,
    pieces: list[list[int]],
    questions: list[tuple[list[int], list[int]]],
    rng: np.random.Generator,
) -> Row:
    """Pieces in their order at random places of a text, the questions with their answers last."""
    asked = [token for question, answer in questions for token in (*question, *answer)]
    answers = [flag for question, answer in questions for flag in (*[False] * len(question), *[True] * len(answer))]
    filler = length - 1 - sum(map(len, pieces)) - len(asked)
    places = np.sort(rng.integers(0, filler + 1, len(pieces))).tolist()
    body = insert_pieces(text_window(text, filler, rng), pieces, places)
    # The text is not predicted here: text rows repeat the corpus often enough for a small model to memorise it.
    return np.array([vocabulary.bos, *body, *asked]), np.array([False] * (1 + len(body)) + answers)


ROWS = {"text": text_row, "lookup": lookup_row, "needle": needle_row, "copy": copy_row, "variable": variable_row}


@dataclass(frozen=True)
class Batches(Dataset):
    """Item `step` is the batch of that step: tokens int16 [B, T] and supervised bool [B, T], B x T = `batch_tokens`."""

    vocabulary: RecallVocabulary
    tokens: Path
    steps: int
    batch_tokens: int
    seed: int

    def __len__(self) -> int:
        """The number of steps."""
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the batch of `step`."""
        rng = np.random.default_rng([self.seed, step])
        shares = next(shares for until, shares in LENGTHS if step < until * self.steps or until == 1)
        length = int(rng.choice(list(shares), p=list(shares.values())))
        rows = [self._row(length, rng) for _ in range(max(1, self.batch_tokens // length))]
        tokens, supervised = (np.stack(column) for column in zip(*rows, strict=True))
        return torch.from_numpy(tokens.astype(np.int16)), torch.from_numpy(supervised)

    def _row(self, length: int, rng: np.random.Generator) -> Row:
        task = rng.choice(list(ROW_SHARES), p=list(ROW_SHARES.values()))
        kind = rng.choice(list(TEXT_SHARES), p=list(TEXT_SHARES.values()))
        text = np.load(self.tokens / f"{kind}.npy", mmap_mode="r")
        return ROWS[task](self.vocabulary, text, length, rng)
