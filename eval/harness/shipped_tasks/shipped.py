"""The data of the tasks that come with the project: made from the held-out text and the words of the recall tasks."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer

from hf_fastattn.eval.checkpoint.recall import RecallVocabulary, heldout_documents
from hf_fastattn.eval.choices import SHIPPED

SEED = 0
# Documents to take examples from, and questions.
EXAMPLES, QUESTIONS = 40, 64
# Characters before a line to be guessed, of an example and of a question: with five examples about 1,000 tokens.
BEFORE = 540
# Characters and least tokens of such a line.
LINE, LINE_TOKENS = (48, 100), 9
PAIRS, CHOICES = 56, 4


def _split(docs: list[dict[str, Any]]) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        fewshot=datasets.Dataset.from_list(docs[:EXAMPLES]), test=datasets.Dataset.from_list(docs[EXAMPLES:])
    )


def next_lines(**_: Any) -> datasets.DatasetDict:
    """A stretch of text, and which of four lines comes next; the three wrong ones are of the same kind of text."""
    rng = np.random.default_rng([SEED, 1])
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    lines: dict[str, list[tuple[str, str]]] = {}
    for document in heldout_documents():
        text, place = document["text"], 0
        for line in text.splitlines(keepends=True):
            fits = place >= BEFORE and LINE[0] <= len(line.strip()) <= LINE[1]
            if fits and len(tokenizer.encode(line, add_special_tokens=False)) >= LINE_TOKENS:
                lines.setdefault(document["kind"], []).append((text[place - BEFORE : place].rstrip("\n"), line.rstrip()))
            place += len(line)
    docs = []
    for _number in range(EXAMPLES + QUESTIONS):
        known = lines[str(rng.choice(sorted(lines)))]
        picked = [known[int(place)] for place in rng.choice(len(known), CHOICES, replace=False)]
        gold = int(rng.integers(CHOICES))
        docs.append({"text": picked[gold][0], "choices": [line for _, line in picked], "gold": gold})
    return _split(docs)


def _words() -> tuple[list[str], list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    vocabulary = RecallVocabulary.from_tokenizer(tokenizer)
    keys, values = ([tokenizer.decode([int(word)]) for word in words] for words in (vocabulary.keys, vocabulary.values))
    return keys, values


def pairs(**_: Any) -> datasets.DatasetDict:
    """Pairs of words, and what stands beside one of them; the choices are single tokens of the shipped checkpoint."""
    rng = np.random.default_rng([SEED, 2])
    keys, values = _words()
    docs = []
    for _number in range(EXAMPLES + QUESTIONS):
        names = [keys[int(place)] for place in rng.choice(len(keys), PAIRS, replace=False)]
        words = [values[int(place)] for place in rng.choice(len(values), PAIRS, replace=False)]
        asked = int(rng.integers(PAIRS))
        others = [int(place) for place in rng.choice([p for p in range(PAIRS) if p != asked], CHOICES - 1, replace=False)]
        gold = int(rng.integers(CHOICES))
        choices = [words[place] for place in others]
        choices.insert(gold, words[asked])
        text = "".join(f"{name}{word}\n" for name, word in zip(names, words, strict=True)) + names[asked]
        docs.append({"text": text, "choices": choices, "gold": gold})
    return _split(docs)


def needles(**_: Any) -> datasets.DatasetDict:
    """Text in which three words are to be remembered, at any depth, and the question for them at its end."""
    rng = np.random.default_rng([SEED, 3])
    keys, values = _words()
    texts = [document["text"] for document in heldout_documents() if len(document["text"]) > 2500]
    docs = []
    for _number in range(EXAMPLES + QUESTIONS):
        text = texts[int(rng.integers(len(texts)))]
        first = int(rng.integers(len(text) - 2400))
        length, name = int(rng.integers(400, 2400)), keys[int(rng.integers(len(keys)))]
        body = text[first : first + length]
        code = "".join(values[int(rng.integers(len(values)))] for _ in range(3))
        place = int(rng.integers(length))
        docs.append(
            {"text": f"{body[:place]}\nRemember{name}{code}.\n{body[place:]}\nRecall{name}", "answer": f"{code.strip()}."}
        )
    return _split(docs)


def beginnings(**_: Any) -> datasets.DatasetDict:
    """Stretches of text of many lengths, to go on from."""
    rng = np.random.default_rng([SEED, 4])
    texts = [document["text"] for document in heldout_documents() if len(document["text"]) > 4000]
    docs = []
    for _number in range(QUESTIONS):
        text, length = texts[int(rng.integers(len(texts)))], int(np.exp(rng.uniform(np.log(200), np.log(4000))))
        first = int(rng.integers(len(text) - length))
        docs.append({"text": text[first : first + length], "answer": text[first + length : first + length + 20]})
    return datasets.DatasetDict(test=datasets.Dataset.from_list(docs))


def documents(**_: Any) -> datasets.DatasetDict:
    """The beginnings of the held-out documents."""
    docs = [{"text": document["text"][:1500]} for document in heldout_documents()]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(docs))
