"""The check before every figure of speed: sound models pass it, wrong tokens do not."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

from hf_fastattn.eval.accuracy.agreement import Agreement
from hf_fastattn.eval.choices import KINDS
from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.systems import twin
from tests.tools.models import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_agreement_of_a_sound_model(kind: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    case = Case(kind, 1 if kind == "drafts" else 3, 40)
    verdict = Agreement(model, twin(model), {})(case.ids(128, 0, model.device), case.arguments)
    assert verdict.agrees, verdict.detail
    assert model.dtype == dtype


def wrong_token(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The model's own `generate()` returns other tokens, as a faulty loop would; its forwards are right."""

    def faulty(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return change(type(self).generate(self, *args, **kwargs))

    model.generate = MethodType(faulty, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["greedy", "samples"])
def test_agreement_looks_at_the_tokens_of_generate(kind: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    case = Case(kind, 3, 40)
    ours = twin(model)

    def least_likely(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            tokens[-1, -1] = model(tokens[-1:, :-1]).logits[0, -1].argmin()
        return tokens

    wrong_token(ours, least_likely)
    verdict = Agreement(model, ours, {})(case.ids(128, 0, model.device), case.arguments)
    assert not verdict.agrees and "tokens miss" in verdict.detail


def test_agreement_in_fp32_wants_the_tokens_of_stock() -> None:
    model = tiny("llama")
    case = Case("greedy", 3, 40)
    ours = twin(model)
    # The middle row is not among those that the exact model computes.
    wrong_token(ours, lambda tokens: tokens.index_fill(0, torch.tensor([1]), 5))
    verdict = Agreement(model, ours, {})(case.ids(128, 0, model.device), case.arguments)
    assert not verdict.agrees and "greedy tokens are not stock's" in verdict.detail
