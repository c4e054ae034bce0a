"""Recall tasks whose answers stand far back in the context: needle, key-value look-up, variable tracking, copying.

The statements built here are used by training (`rows.py`) and by evaluation (`recall_prompts`). Every word of a task is one
token that begins with a space. Keys and values come from disjoint halves of the words, so a key occurs once as a
statement and what follows it is the answer. Prompts are token ids: text cut at random places need not survive `decode`
and `encode` (a look-up prompt does).

    needle    \\nRemember oak river stone lamp.\\n ... \\nRecall oak           -> river stone lamp
    lookup    \\n oak river\\n elm lamp ... \\n oak                             -> river
    variable  \\nSet oak river\\n ... \\nSet elm oak\\n ... \\nTrace elm          -> oak river
    copy      \\nCopy w1 w2 ... w16\\n ... \\nAgain                             -> w1 w2 ... w16
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

TASKS = ("needle", "lookup", "variable", "copy")
MARKERS = ("Remember", "Recall", "Set", "Trace", "Copy", "Again", ".")
NEEDLE_WORDS = 3
NEEDLES = 4  # in an evaluation prompt: the one asked for and three others
CHAINS, HOPS = 3, 2
COPY_WORDS = 16


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids of the tasks: separators, markers, and the single-token words, split into keys and values."""

    bos: int
    newline: int
    markers: dict[str, list[int]]
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    @lru_cache(maxsize=4)
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "RecallVocabulary":
        """Collect the words of three or more letters that are one token with their leading space."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        letters = set(string.ascii_letters)
        pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
        # How byte-level BPE and SentencePiece write a leading space.
        words = [i for i, piece in pieces if piece[:1] in ("Ġ", "▁") and len(piece) > 3 and letters.issuperset(piece[1:])]
        newline = encode("\n")[-1]
        return cls(
            bos=newline if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
            newline=newline,
            markers={marker: encode(marker) for marker in MARKERS},
            keys=np.array(words[0::2]),
            values=np.array(words[1::2]),
        )

    def pick_keys(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` different keys."""
        return rng.choice(self.keys, count, replace=False)

    def pick_values(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` values, repeats allowed."""
        return rng.choice(self.values, count)

    def statement(self, marker: str, words: Sequence[int], end: str = "") -> list[int]:
        """A line of its own: newline, marker, words, optional end mark, newline."""
        tail = self.markers[end] if end else []
        return [*self.question(marker, words), *tail, self.newline]

    def question(self, marker: str, words: Sequence[int] | np.ndarray = ()) -> list[int]:
        """The start of a line that asks: newline, marker, words."""
        return [self.newline, *self.markers[marker], *(int(word) for word in words)]


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt of exact length (bos included) and the tokens that must follow it."""

    task: str
    prompt: list[int]
    answer: list[int]


def text_window(text: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` consecutive tokens of `text`, wrapped round its end."""
    start = int(rng.integers(len(text)))
    return np.take(text, np.arange(start, start + length), mode="wrap")


def insert_pieces(text: np.ndarray, pieces: list[list[int]], places: Sequence[int]) -> list[int]:
    """Insert each piece before `text[place]`; pieces of one place keep their order."""
    tokens, start = [], 0
    for index in np.argsort(places, kind="stable"):
        tokens += [*text[start : places[index]].tolist(), *pieces[index]]
        start = places[index]
    return tokens + text[start:].tolist()


def needle_pieces(vocabulary: RecallVocabulary, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Names `[count]` and codes `[count, NEEDLE_WORDS]` of `count` needles."""
    codes = vocabulary.pick_values(count * NEEDLE_WORDS, rng).reshape(count, NEEDLE_WORDS)
    return vocabulary.pick_keys(count, rng), codes


def variable_chain(vocabulary: RecallVocabulary, names: np.ndarray, value: int) -> tuple[list[list[int]], list[int]]:
    """Assignments `names[0] = value`, `names[1] = names[0]`, ..., and the path from the last name to the value."""
    path = [int(name) for name in names[::-1]] + [int(value)]
    statements = [vocabulary.statement("Set", path[i : i + 2]) for i in range(len(names))]
    return statements[::-1], path


def recall_prompt(
    task: str, vocabulary: RecallVocabulary, text: np.ndarray, length: int, depth: float, rng: np.random.Generator
) -> RecallPrompt:
    """One evaluation prompt of `length` tokens; its answer stands at `depth` (0 start, 1 end) of the context.

    text: token ids of the haystack, from which a random window is taken (`lookup` needs none: pairs fill the prompt).
    """
    if task not in TASKS:
        raise ValueError(f"unknown recall task {task!r}; known: {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")
    if task == "lookup":
        return _lookup_prompt(vocabulary, length, depth, rng)
    if task == "needle":
        names, codes = needle_pieces(vocabulary, NEEDLES, rng)
        pieces = [vocabulary.statement("Remember", [name, *code], ".") for name, code in zip(names, codes, strict=True)]
        question, answer, ours = vocabulary.question("Recall", names[:1]), codes[0].tolist(), 1
    elif task == "variable":
        names, values = vocabulary.pick_keys(CHAINS * (HOPS + 1), rng), vocabulary.pick_values(CHAINS, rng)
        chains = [variable_chain(vocabulary, names[i::CHAINS], values[i]) for i in range(CHAINS)]
        pieces = [statement for statements, _ in chains for statement in statements]
        question, answer, ours = vocabulary.question("Trace", chains[0][1][:1]), chains[0][1][1:], HOPS + 1
    else:
        answer, ours = vocabulary.pick_values(COPY_WORDS, rng).tolist(), 1
        pieces, question = [vocabulary.statement("Copy", answer)], vocabulary.question("Again")
    filler = length - 1 - sum(map(len, pieces)) - len(question)
    if filler < 0:
        raise ValueError(f"{task} needs at least {length - filler} tokens, got length {length}")
    others = np.sort(rng.integers(0, filler + 1, len(pieces) - ours))
    places = [*[int(depth * filler)] * ours, *others.tolist()]
    body = insert_pieces(text_window(text, filler, rng), pieces, places)
    return RecallPrompt(task, [vocabulary.bos, *body, *question], answer)


def _lookup_prompt(vocabulary: RecallVocabulary, length: int, depth: float, rng: np.random.Generator) -> RecallPrompt:
    pairs, spare = divmod(length - 3, 3)
    if not 1 <= pairs <= len(vocabulary.keys):
        raise ValueError(f"lookup needs a length of 6 to {3 * len(vocabulary.keys) + 3} tokens, got {length}")
    keys, values = vocabulary.pick_keys(pairs, rng), vocabulary.pick_values(pairs, rng)
    table = np.stack([np.full(pairs, vocabulary.newline), keys, values], axis=1)
    asked = int(depth * (pairs - 1))
    start = [vocabulary.bos, *vocabulary.pick_values(spare, rng).tolist()]
    prompt = [*start, *table.ravel().tolist(), vocabulary.newline, int(keys[asked])]
    return RecallPrompt("lookup", prompt, [int(values[asked])])


@lru_cache(maxsize=1)
def heldout_documents() -> tuple[dict[str, str], ...]:
    """The shipped held-out documents: `source`, `kind` and `text` of each."""
    return tuple(json.loads(Path(__file__).with_name("heldout.json").read_text(encoding="utf-8")))


@lru_cache(maxsize=4)
def heldout_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The held-out text as one row of tokens, the haystack of evaluation."""
    texts = [document["text"] for document in heldout_documents()]
    return np.concatenate([tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts])


def recall_prompts(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, depth: float, count: int, seed: int = 0
) -> list[RecallPrompt]:
    """`count` evaluation prompts in held-out text; equal arguments give equal prompts.

    >>> prompts = recall_prompts(tokenizer, "needle", length=512, depth=0.5, count=8)
    >>> output = model.generate(torch.tensor([prompts[0].prompt]), max_new_tokens=len(prompts[0].answer))
    """
    vocabulary, text = RecallVocabulary.from_tokenizer(tokenizer), heldout_tokens(tokenizer)
    rng = np.random.default_rng([seed, TASKS.index(task) if task in TASKS else 0, length, round(depth * 1000)])
    return [recall_prompt(task, vocabulary, text, length, depth, rng) for _ in range(count)]
