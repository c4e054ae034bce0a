"""The cases of the batching benchmark: which requests there are, when they arrive, and what is asked of their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: tokens.
        new: tokens that it gets.
        arrival: seconds after the first one may arrive.
        after: arrives when the request of this place has got so many tokens, instead.
    """

    prompt: list[int]
    new: int
    arrival: float = 0.0
    after: tuple[int, int] | None = None


@dataclass(frozen=True)
class Case:
    """A case by name.

    Args:
        kind: `offline` (all there at once, to be done soon), `arrival` (a long prompt comes while rows decode) or `load`
            (requests arrive at several rates).
        shape: of the model on a GPU, one of `SHAPES`.
        requests: how many.
        prompt: shortest and longest prompt, uniformly drawn.
        new: fewest and most new tokens, uniformly drawn, or `log`-uniformly.
        long_prompt: tokens of the prompt of an `arrival`.
        midway: new tokens are fewer than the case has, and prompts longer, so that a step reads as much as the average one.
        aims: limits of figures on the GPU: of `ours / SYSTEM` and the `slowest` gap over the median at most, of the `share`
            of the decode limit at least, of `whole_s` seconds at most.
        whole: new tokens of the case before they were made fewer.
        said: what was made smaller.
    """

    kind: str
    shape: str
    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    log: bool = False
    long_prompt: int = 0
    midway: bool = False
    aims: Mapping[str, float] = field(default_factory=dict)
    whole: int = 0
    said: tuple[str, ...] = ()

    def limited(self, requests: int | None, most_new: int | None) -> Case:
        """The same with at most so many requests, of so many new tokens, in proportion."""
        made = dataclasses.replace(self, whole=self.new[1])
        if requests is not None and requests < self.requests:
            said = f"{requests} of {self.requests} requests"
            made = dataclasses.replace(made, requests=requests, said=(*made.said, said))
        if most_new is None or most_new >= self.new[1]:
            return made
        said = f"at most {most_new} of {self.new[1]} new tokens"
        fewest = max(self.new[0] * most_new // self.new[1], 1)
        made = dataclasses.replace(made, new=(fewest, most_new), said=(*made.said, said))
        if not self.midway:
            return made
        more = (self.new[1] - most_new) // 2
        said = f"prompts of {more} tokens more, so that steps read as much as on average"
        return dataclasses.replace(made, prompt=(self.prompt[0] + more, self.prompt[1] + more), said=(*made.said, said))

    @property
    def longest(self) -> int:
        """Positions that a request takes at most."""
        return max(self.prompt[1] + self.new[1], self.long_prompt + LONG_NEW)

    def asks(self, vocabulary: int, number: int) -> list[Ask]:
        """Round `number`: other tokens, but the same lengths."""
        lengths, tokens = np.random.default_rng(1), np.random.default_rng(1000 + number)
        prompts = lengths.integers(self.prompt[0], self.prompt[1] + 1, self.requests).tolist()
        low, high = self.new
        news = lengths.integers(low, high + 1, self.requests).tolist()
        if self.log:
            news = np.exp(lengths.uniform(np.log(low), np.log(high + 1), self.requests)).astype(int).tolist()
        made = [Ask(tokens.integers(3, vocabulary, length).tolist(), new) for length, new in zip(prompts, news, strict=True)]
        if self.long_prompt:
            prompt = tokens.integers(3, vocabulary, self.long_prompt).tolist()
            made.append(Ask(prompt, LONG_NEW, after=(0, max(made[0].new // 4, 1))))
        return made


# New tokens of a long prompt that comes while rows decode.
LONG_NEW = 16
SEVEN, EIGHT = "qwen2.5-7b", "llama-3-8b"
AIMS_OF_RAGGED = {"ours / patched_padded": 1.03, "ours / stock_batch": 1 / 8}
AIMS_OF_MIXED = {"ours / stock_batch": 1 / 10, "ours / stock_padded": 1 / 3, "share": 0.65}

ON_GPU = {
    "ragged": Case("offline", SEVEN, 64, (64, 1024), (128, 128), aims=AIMS_OF_RAGGED),
    "outputs": Case("offline", SEVEN, 64, (64, 1024), (16, 512), aims={"ours / patched_padded": 0.6}),
    "mixed": Case("offline", EIGHT, 512, (64, 2048), (16, 1024), log=True, aims=AIMS_OF_MIXED),
    "long": Case("offline", EIGHT, 32, (64, 64), (8192, 8192), midway=True, aims={"whole_s": 100}),
    "arrival": Case("arrival", EIGHT, 64, (512, 512), (512, 512), long_prompt=16384, aims={"slowest": 3}),
    "load": Case("load", SEVEN, 64, (64, 1024), (16, 256)),
}
ON_CPU = {
    "ragged": Case("offline", SEVEN, 16, (32, 256), (32, 32), aims={"ours / stock_batch": 1 / 1.5}),
    "outputs": Case("offline", SEVEN, 16, (32, 256), (4, 64)),
    "mixed": Case("offline", EIGHT, 32, (16, 512), (4, 64), log=True),
    "long": Case("offline", EIGHT, 4, (16, 16), (512, 512), midway=True),
    "arrival": Case("arrival", EIGHT, 8, (64, 64), (96, 96), long_prompt=2048),
    "load": Case("load", SEVEN, 24, (32, 128), (8, 48)),
}


def arriving(asks: list[Ask], rate: float) -> list[Ask]:
    """The same, arriving one by one at random, `rate` a second on average (a Poisson process)."""
    gaps = np.random.default_rng(2).exponential(1 / rate, len(asks))
    times = (np.cumsum(gaps) - gaps[0]).tolist()
    return [dataclasses.replace(ask, arrival=time) for ask, time in zip(asks, times, strict=True)]
