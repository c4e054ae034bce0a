"""A patched model, what its unpatched twin generates for a prompt by itself, and an engine driven by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

import hf_fastattn
from hf_fastattn.batching.choice import Choice, choice_of
from hf_fastattn.batching.engine import Engine
from hf_fastattn.batching.engine_parts import EngineParts
from hf_fastattn.batching.requests import Request
from tests.tools.models import VOCAB, tiny

NEW = 24
# By model and prompt.
_KNOWN: dict[tuple[Any, ...], list[int]] = {}


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Random prompts of random lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


class Twins:
    """A patched model and its unpatched twin.

    Args:
        family: of `tests.tools.models.MODELS`.
        device: of both.
        layers: how many they have.
        options: of the patch.
    """

    def __init__(self, family: str, device: str, layers: int = 3, **options: Any) -> None:
        self.stock = tiny(family, num_hidden_layers=layers).to(device)
        self.model = hf_fastattn.patch(copy.deepcopy(self.stock), **options)
        self._weights: Any = (family, device, layers)

    def alone(self, prompt: list[int], new: int = NEW, ends: tuple[int, ...] = ()) -> list[int]:
        """The greedy tokens of one prompt, by the unpatched model."""
        key = (self._weights, tuple(prompt), new, ends)
        if key not in _KNOWN:
            ids = torch.tensor([prompt], device=self.stock.device)
            given = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(ends) or None}
            _KNOWN[key] = self.stock.generate(ids, **given)[0, len(prompt) :].tolist()
        return _KNOWN[key]

    def changed(self) -> None:
        """The weights of both are others now."""
        self._weights = object()

    @property
    def report(self) -> Any:
        """Of the patched one."""
        return hf_fastattn.report(self.model)


class Driven:
    """An engine without a thread, and all that it has delivered.

    Args:
        twins: whose patched model it serves.
        tokens: that pages may hold.
        generation: how tokens are chosen; greedy if it is not said.
        hints: Transformers' `WorkloadHints`.
        options: of `ContinuousBatchingConfig`.
    """

    def __init__(
        self, twins: Twins, tokens: int | None = None, generation: GenerationConfig | None = None, hints: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if tokens is not None:
            known = ContinuousBatchingConfig.__dataclass_fields__
            options |= {"num_blocks": tokens // 4, "page_size" if "page_size" in known else "block_size": 4}
        self.twins, self.config = twins, ContinuousBatchingConfig(**options)
        choice = choice_of(twins.model, generation or GenerationConfig(do_sample=False), self.config)
        assert isinstance(choice, Choice), choice
        self.parts = EngineParts(twins.model, choice, self.config)
        self.outputs: dict[str, list[Any]] = {}
        self._hold = functools.partial(torch.no_grad)
        with self._hold():
            self.engine: Engine = self.parts.engine(self._deliver, hints)
        self._cache = self.engine._pages.cache

    def _deliver(self, requests: list[Request]) -> None:
        for request in requests:
            self.outputs.setdefault(request.state.request_id, []).append(request.state.to_generation_output())

    def add(self, name: str, prompt: list[int], new: int | None = NEW, **options: Any) -> None:
        """A request arrives."""
        self.engine.add(RequestState(name, prompt, max_new_tokens=new, **options))

    def run(self, rounds: int | None = None) -> None:
        """So many rounds, or until nothing is left to do."""
        with self._hold():
            for _ in range(rounds if rounds is not None else 10_000):
                if self.engine.is_idle:
                    return
                self.engine.run()
        assert rounds is not None, "the engine does not come to an end"

    def release(self) -> Any:
        """The engine ends; returns the counters. No page is held any more."""
        counters = self.twins.report.last_call
        if self.engine.is_idle:
            # Whoever has ended holds no page.
            assert not any(pages for table in self._cache.tables.values() for pages in table.rows)
        self.parts.release(self.engine)
        assert self.twins.report.pages_in_use == 0
        return counters

    def tokens(self, name: str) -> list[int]:
        """Of a request that is over, without an error."""
        last = self.outputs[name][-1]
        assert last.error is None and last.is_finished()
        found: list[int] = last.generated_tokens
        return found
