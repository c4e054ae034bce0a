"""The cases of the `generate()` benchmark: kinds of calls, and the sizes that are measured if none are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# Tokens that prompt lookup guesses, and how often a prompt says the same.
LOOKUP, REPEATS = 8, 8
# Kinds whose rows end before the call does.
ENDING = ("finished", "early")
SHORTEST = 16
TOP_K, TOP_P = 50, 0.9


class Cooler(LogitsProcessor):
    """A user's logits processor: a temperature, which changes no greedy token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / 0.7


class NeverStop(StoppingCriteria):
    """A user's stopping criterion, which looks at the tokens on the device and lets every row go on."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] < 0


class Reader(BaseStreamer):
    """A user's streamer: reads every token on the host."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """Tokens `[B]`, or the prompts `[B, S]`."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """The call is over."""


@dataclass(frozen=True)
class Case:
    """`rows` sequences of one kind of call, with prompts of `prompt` tokens."""

    kind: str
    rows: int
    prompt: int

    @property
    def name(self) -> str:
        """Rows x prompt, or samples of a prompt."""
        size = f"{self.prompt // 1024}k" if self.prompt % 1024 == 0 else str(self.prompt)
        return f"{self.rows} x {size}" if self.kind != "samples" else f"{self.rows} of {size}"

    @property
    def prompts(self) -> int:
        """Distinct prompts."""
        return 1 if self.kind == "samples" else self.rows

    def ids(self, vocabulary: int, number: int, device: torch.device) -> Tensor:
        """Prompts `[prompts, prompt]` of random tokens; another `number` gives others, so that no cache of prompts of an
        earlier call helps. The first eighth of the vocabulary, where special tokens lie, is left out."""
        generator = torch.Generator().manual_seed(number)
        different = -(-self.prompt // REPEATS) if self.kind == "drafts" else self.prompt
        ids = torch.randint(vocabulary // 8, vocabulary, (self.prompts, different), generator=generator)
        return ids.repeat(1, -(-self.prompt // different))[:, : self.prompt].to(device)

    def arguments(self, rows: int | None = None) -> dict[str, Any]:
        """Options of `generate()`, with new callbacks; `rows` other than the case's."""
        if self.kind == "sampling":
            return {"do_sample": True, "top_k": TOP_K, "top_p": TOP_P}
        if self.kind == "samples":
            return {"do_sample": True, "top_k": TOP_K, "num_return_sequences": rows or self.rows}
        if self.kind == "callbacks":
            callbacks = {"logits_processor": [Cooler()], "stopping_criteria": [NeverStop()], "streamer": Reader()}
            return {"do_sample": False, **callbacks}
        if self.kind == "drafts":
            return {"do_sample": False, "prompt_lookup_num_tokens": LOOKUP}
        return {"do_sample": False}

    def lengths(self, tokens: int) -> list[int] | None:
        """New tokens of each row in a call of `tokens`, where rows end before that, longer rows behind shorter ones."""
        if self.kind not in ENDING:
            return None
        shares = [(row + 1) / self.rows for row in range(self.rows)]
        if self.kind == "early" and tokens > SHORTEST:
            return [round(SHORTEST * (tokens / SHORTEST) ** share) for share in shares]
        return [1 + int((tokens - 1) * share) for share in shares]

    def steps(self, new: int) -> list[int]:
        """Of the `new` steps after the first token, those in which each row still takes part."""
        lengths = self.lengths(1 + new)
        return [new] * self.rows if lengths is None else [length - 1 for length in lengths]


ON_GPU = (
    Case("greedy", 1, 512),
    Case("greedy", 1, 8192),
    Case("greedy", 16, 2048),
    Case("greedy", 64, 1024),
    Case("sampling", 16, 2048),
    Case("callbacks", 1, 512),
    Case("samples", 16, 8192),
    Case("samples", 64, 2048),
)
ON_CPU = (
    Case("greedy", 1, 512),
    Case("greedy", 8, 512),
    Case("sampling", 4, 128),
    Case("callbacks", 1, 512),
    Case("samples", 8, 1000),
)


def choose(
    kinds: Sequence[str] | None, rows: Sequence[int] | None, prompts: Sequence[int] | None, on_gpu: bool
) -> list[Case]:
    """The cases that a command line names.

    Args:
        kinds: only these; all (with sizes: `greedy`) if None.
        rows: sequences of each case; the standard sizes of each kind if None.
        prompts: prompt lengths, one for each of `rows` or one for all.

    Raises:
        ValueError: the two lists do not fit each other, a kind has no standard sizes, or none of this number of rows.
    """
    if rows is None:
        if prompts is not None:
            raise ValueError("--prompt needs --batch: the number of rows of each case")
        standard = ON_GPU if on_gpu else ON_CPU
        found = [case for case in standard if kinds is None or case.kind in kinds]
        if kinds is not None and set(kinds) != {case.kind for case in found}:
            raise ValueError(f"{sorted(set(kinds) - {case.kind for case in found})} needs --batch: it has no standard sizes")
        return found
    if "drafts" in (kinds or ()) and set(rows) != {1}:
        raise ValueError(f"--batch is {' '.join(map(str, rows))}; drafts are for one row: give --batch 1")
    lengths = list(prompts or (512,))
    if len(lengths) not in (1, len(rows)):
        raise ValueError(f"--prompt names {len(lengths)} lengths for {len(rows)} of --batch; give one, or one for each")
    lengths = lengths * (len(rows) // len(lengths))
    return [Case(kind, *size) for kind in kinds or ("greedy",) for size in zip(rows, lengths, strict=True)]
