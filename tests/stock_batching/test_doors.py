"""Who is let in, and that nobody else notices."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api, initialization
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_fastattn
from hf_fastattn.interface import counters
from hf_fastattn.stock_batching import doors
from hf_fastattn.stock_batching.page_cache import StockPages
from tests.stock_batching.served import alone, assert_in_place, batched, batching, greedy, pair, prompts
from tests.tools.fresh import fresh
from tests.tools.models import OLD

SEEN = ("paged|sdpa" if OLD else "sdpa", "paged|eager")


def test_both_names() -> None:
    stock, model = pair("llama")
    given = prompts(3)
    with warnings.catch_warnings():
        # Transformers says that the prefix is not needed any more.
        warnings.simplefilter("ignore", FutureWarning)
        model.set_attn_implementation("paged|fastattn")
    assert batched(model, given) == alone(stock, given)
    assert_in_place()
    assert model.config._attn_implementation == ("paged|fastattn" if OLD else "fastattn")


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_others_are_served_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, _ = pair("gemma3")
    stock.set_attn_implementation(name)
    made: list[Any] = []
    create = continuous_api.ContinuousBatchingManager._create_batch_processor

    def noted(self: Any) -> Any:
        made.append((self, create(self)))
        return made[-1][1]

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor", noted)
    batched(stock, prompts(3))
    manager, processor = made[-1]
    assert type(processor.cache) is PagedAttentionCache
    assert processor.cache.max_blocks_per_request == 0
    assert not manager.continuous_batching_config.use_async_batching
    assert stock.config._attn_implementation == name
    assert not counters.batches and not counters.kernels, counters


def test_inputs_are_filled_before_other_streams_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("llama")
    settled: list[torch.device] = []
    monkeypatch.setattr(doors, "_settle", settled.append)
    batched(model, prompts(2))
    # Once when the processor is made or taken up again, and before its first batch at the latest.
    assert settled and set(settled) == {model.device}


def test_unknown_names_are_refused_as_before() -> None:
    stock, _ = pair("llama")
    is_flash = initialization.is_flash_attention_requested
    assert is_flash(requested_attention_implementation="flash_attention_2")
    assert not is_flash(requested_attention_implementation="sdpa")
    stock.config._attn_implementation_internal = "flex_attention"
    if not OLD:
        with pytest.raises(ValueError, match="flex_attention is not supported for continuous batching"):
            stock.init_continuous_batching(generation_config=greedy())


def test_registering_again_wraps_nothing_again() -> None:
    before = continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn
    hf_fastattn.register()
    assert continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn is before


def test_without_registration_transformers_is_untouched() -> None:
    script = """
import hf_fastattn, hf_fastattn.config
from transformers.generation.continuous_batching import cache, continuous_api, initialization
assert continuous_api.PagedAttentionCache is cache.PagedAttentionCache
assert "fastattn" not in continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn.__module__
assert cache.is_flash_attention_requested is initialization.is_flash_attention_requested
"""
    assert fresh(script) == ""


def test_what_our_kernels_do_not_take_runs_on_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    given = prompts(4)
    monkeypatch.setattr(doors, "why_not_pages", lambda model: "the GPU is too old")
    seen: list[str] = []
    options = {"generation_config": greedy(), "continuous_batching_config": batching()}
    with model.continuous_batching_context_manager(**options) as manager:
        seen.append(model.config._attn_implementation)
        manager.add_requests(given, max_new_tokens=20)
        found = {}
        while len(found) < len(given):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = output.generated_tokens
    assert [found[name] for name in sorted(found)] == alone(stock, given)
    assert seen[0] in SEEN and model.config._attn_implementation == "fastattn"
    assert dict(counters.fallbacks) == {"continuous batching: the GPU is too old": 1}
    assert not counters.batches, counters


class _BiasedAttention(LlamaAttention):
    """Gives the attention function a bias, which is the same for all keys."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, position_bias=torch.ones(1, self.config.num_attention_heads, 1, 1), **kwargs)


def test_a_bias_runs_on_sdpa() -> None:
    """Our kernels, which read pages in place, have no keys to add it to: stock serves the model, with no error."""
    stock, model = pair("llama")
    given = prompts(4)
    for one in (stock, model):
        for layer in one.model.layers:
            layer.self_attn.__class__ = _BiasedAttention
    assert batched(model, given) == batched(stock, given)
    assert dict(counters.fallbacks) == {"continuous batching: attention has a position_bias": 1}
    assert not counters.batches and model.config._attn_implementation == "fastattn"


def test_models_at_once_in_threads() -> None:
    stock, model = pair("gemma3")
    stock.set_attn_implementation("sdpa")
    given = prompts(5)
    want = alone(stock, given)
    models = [stock, model, copy.deepcopy(stock), copy.deepcopy(model)]
    found: dict[int, list[list[int]]] = {}

    def serve(place: int) -> None:
        found[place] = batched(models[place], given)

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), want)


def test_layers_of_a_recorded_forward_share_nothing_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is recorded has the tensors of the one before it, and must compute from them again."""
    _, model = pair("llama")
    layer = StockPages.layer
    steps: dict[int, list[Any]] = {}

    def noted(self: StockPages, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        made = layer(self, key, value, layer_idx, kwargs)
        steps.setdefault(layer_idx, []).append(made.step)
        return made

    monkeypatch.setattr(StockPages, "layer", noted)
    batched(model, prompts(2))
    for later in (steps[1], steps[2]):
        assert all(a is b for a, b in zip(steps[0], later, strict=True))
    assert len({id(step) for step in steps[0]}) == len(steps[0])
