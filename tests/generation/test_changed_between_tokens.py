"""Code of the user's that changes the model between two tokens, where it stands in what looks like Transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from hf_fastattn.generation.users_code import runs_as_written, runs_between_forwards
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import run
from tests.tools.models import FAMILIES, letters, pair_with_graphs, single
from tests.tools.reexecuted import reexecuted_loop

PROMPT, NEW = single(20), 10


class Change:
    """Exchanges a weight when it is asked for the fourth time."""

    def __init__(self, model: Any) -> None:
        self.layer, self.asked = model.model.layers[0].mlp.down_proj, 0

    def __call__(self) -> None:
        self.asked += 1
        if self.asked == 4:
            self.layer.weight = nn.Parameter(-self.layer.weight.detach())


class Calls(nn.Module):
    """A module of the user's around another."""

    def __init__(self, inner: nn.Module, change: Change) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Any:
        self.change()
        return self.inner(x)


class Tokenizer:
    def __init__(self, change: Change) -> None:
        self.change = change

    def decode(self, *_: Any, **__: Any) -> str:
        self.change()
        return "x"


def in_a_method(kind: Any, name: str, **options: Any) -> Callable[[Any, pytest.MonkeyPatch], Any]:
    def call(model: Any, patch: pytest.MonkeyPatch) -> Any:
        change, inner = Change(model), getattr(kind, name)
        patch.setattr(kind, name, lambda *args, **kwargs: (change(), inner(*args, **kwargs))[1])
        return run(model, PROMPT, NEW, **options)

    return call


def in_the_tokenizer(model: Any, patch: pytest.MonkeyPatch) -> Any:
    return run(model, PROMPT, NEW, streamer=TextStreamer(Tokenizer(Change(model))))  # type: ignore[arg-type]


def in_a_module(model: Any, patch: pytest.MonkeyPatch) -> Any:
    layer = model.model.layers[2].mlp
    layer.down_proj = Calls(layer.down_proj, Change(model))
    return run(model, PROMPT, NEW)


def by_hand(model: Any, patch: pytest.MonkeyPatch, own: bool = False) -> Any:
    """Transformers' loop, a change, and on: with that loop, or with forwards of one's own."""

    def loop(model: Any, input_ids: Tensor, stopping_criteria: Any, **kwargs: Any) -> Any:
        def sample(ids: Tensor) -> Tensor:
            kwargs.update({CACHE: DynamicCache(config=model.config), "attention_mask": torch.ones_like(ids)})
            upto = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + NEW // 2)])
            return model._sample(ids, stopping_criteria=upto, **kwargs)

        kwargs.pop("assistant_model", None)
        ids = sample(input_ids)
        layer = model.model.layers[0].mlp.down_proj
        layer.weight = nn.Parameter(-layer.weight.detach())
        if not own:
            kwargs.pop("position_ids", None)
            return sample(ids)
        for _ in range(NEW // 2):
            new = ids[:, kwargs[CACHE].get_seq_length() :]
            logits = model(new, attention_mask=torch.ones_like(ids), **{CACHE: kwargs[CACHE]}).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        return ids

    with torch.no_grad():
        return run(model, PROMPT, NEW, custom_generate=loop)


CODE: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "a processor's class": in_a_method(RepetitionPenaltyLogitsProcessor, "__call__", repetition_penalty=1.1),
    "the processors' class": in_a_method(LogitsProcessorList, "__call__"),
    "a streamer's class": in_a_method(TextStreamer, "put", streamer=TextStreamer(Tokenizer(lambda: None))),  # type: ignore[arg-type]
    "a method of the loop": in_a_method(GenerationMixin, "_has_unfinished_sequences"),
    "a method of the loop over replays": in_a_method(
        GenerationMixin, "_has_unfinished_sequences", return_dict_in_generate=True, output_scores=True
    ),
    "the streamer's tokenizer": in_the_tokenizer,
    "a module": in_a_module,
    "between two loops": by_hand,
    "between a loop and forwards": lambda model, patch: by_hand(model, patch, True),
}


# The device's loop has no such method.
NOT_RECORDED = ("a method of the loop",)


@pytest.mark.parametrize(
    ("place", "recorded"),
    [(place, recorded) for place in CODE for recorded in (False, True) if not (recorded and place in NOT_RECORDED)],
)
def test_a_weight_is_exchanged(place: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair_with_graphs("llama")
    undisturbed = run(stock, PROMPT, NEW)
    found = []
    for one in (stock, model):
        with monkeypatch.context() as patch, reexecuted_loop() if recorded and one is model else nullcontext():
            if one is model:
                run(model, PROMPT, NEW), run(model, PROMPT, NEW)
            result = CODE[place](one, patch)
            found.append(result if isinstance(result, Tensor) else result.sequences)
    assert torch.equal(*found) and not torch.equal(found[0], undisturbed)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_transformers_is_taken_for_a_user_s(family: str) -> None:
    model = pair_with_graphs(family)[1]
    processors, criteria = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)]), StoppingCriteriaList()
    assert runs_as_written(type(model))
    assert not runs_between_forwards(
        model, [processors, *processors, criteria, MaxLengthCriteria(9), TextStreamer(letters())]
    )
