"""What the user's own code changes in a model between two tokens holds from the next one on: no stale step is replayed.

Without a GPU a step runs again (`reexecuted`), and fails if modules are no longer those that it was recorded with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_fastattn
from hf_fastattn.graphs.forward_graphs import CHANGES
from hf_fastattn.graphs.graph_store import GraphStore
from tests.generation.calls import run
from tests.tools.models import FAMILIES, assert_fast, padded_batch, pair, pair_with_graphs
from tests.tools.reexecuted import reexecuted

NEW, AT = 12, 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with reexecuted():
        yield "cpu"


def double(module: Any, args: Any, output: Any) -> Any:
    return output * 1.5


def add_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(double)


def wrap_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) * 1.5


def replace_weight(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.detach() * 1.5


def replace_module(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()


def change_number(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def replace_attention(model: Any) -> None:
    layer = model.model.layers[1]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1.5)


def not_causal(model: Any) -> None:
    model.model.layers[1].self_attn.is_causal = False


CHANGED = (add_hook, wrap_forward, replace_weight, replace_module, change_number)


class Processor(LogitsProcessor):
    """Changes the model when the `AT`-th token is chosen."""

    def __init__(self, model: Any, change: Callable[[Any], None]) -> None:
        self.model, self.change, self.calls = model, change, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == AT:
            self.change(self.model)
        return scores


class Criterion(StoppingCriteria):
    """The same behind each token."""

    def __init__(self, model: Any, change: Callable[[Any], None]) -> None:
        self.processor = Processor(model, change)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.processor(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def hung_in(kind: str, model: Any, change: Callable[[Any], None]) -> dict[str, Any]:
    if kind == "processor":
        return {"logits_processor": LogitsProcessorList([Processor(model, change)])}
    if kind == "criterion":
        return {"stopping_criteria": StoppingCriteriaList([Criterion(model, change)])}
    # A hook around the decoder, which no recorded forward has to know of.
    seen = Processor(model, change)
    model.model.register_forward_hook(lambda module, args, output: seen(output, output) and None)
    return {}


def batch_on(device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in padded_batch().items()}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("kind", ["processor", "criterion", "hook"])
def test_a_change_between_two_tokens_is_seen(kind: str, change: Callable[[Any], None], device: str) -> None:
    stock, model = pair_with_graphs("llama")
    stock, model, batch = stock.to(device), model.to(device), batch_on(device)
    expected = run(stock, batch, NEW, **hung_in(kind, stock, change))
    tokens = run(model, batch, NEW, **hung_in(kind, model, change))
    call = hf_fastattn.report(model).last_call
    assert torch.equal(tokens, expected)
    # The first step is launched, and a hook is called for the prompt too.
    recorded = AT - 2
    assert call.graphs_replayed == recorded and dict(call.uncaptured) == {CHANGES: NEW - 1 - 1 - recorded}
    assert hf_fastattn.report(model).pages_in_use == 0
    # The next call finds the model as it is now.
    assert torch.equal(run(model, batch, NEW), run(stock, batch, NEW))


@pytest.mark.parametrize("change", [replace_attention, not_causal])
@pytest.mark.parametrize("recorded", [False, True])
def test_attention_that_is_not_ours_any_more(change: Callable[[Any], None], recorded: bool) -> None:
    stock, model = pair_with_graphs("qwen2_window") if recorded else pair("qwen2_window")
    batch = padded_batch()
    with reexecuted():
        expected = run(stock, batch, NEW, **hung_in("processor", stock, change))
        tokens = run(model, batch, NEW, **hung_in("processor", model, change))
    call = hf_fastattn.report(model).last_call
    assert torch.equal(tokens, expected)
    (reason, count), *others = call.fallbacks.items()
    assert "layer 1" in reason and count == NEW - AT and not others
    assert call.forwards == AT and hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_code_that_changes_nothing_costs_no_graph(family: str) -> None:
    stock, model = pair_with_graphs(family)
    batch = padded_batch()
    with reexecuted():
        expected = run(stock, batch, NEW, **hung_in("processor", stock, lambda model: None))
        tokens = run(model, batch, NEW, **hung_in("processor", model, lambda model: None))
    assert torch.equal(tokens, expected)
    call = assert_fast(model)
    assert CHANGES not in call.uncaptured and (call.graphs_replayed == NEW - 2 or call.uncaptured)


@pytest.mark.parametrize("own", [False, True])
def test_modules_are_compared_as_often_as_they_may_change(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = pair_with_graphs("llama")[1], list[Any]()
    compare = GraphStore.compare
    monkeypatch.setattr(GraphStore, "compare", lambda self, *given: (compared.append(self), compare(self, *given))[1])
    given = (
        hung_in("processor", model, lambda model: None) if own else {"return_dict_in_generate": True, "output_scores": True}
    )
    with reexecuted():
        run(model, padded_batch(), NEW, **given)
    assert len(compared) == (NEW if own else 1)
    assert assert_fast(model, held=None).graphs_replayed == NEW - 2
