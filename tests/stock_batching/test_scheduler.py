"""Whatever Transformers' scheduler does, tokens on our attention are those of stock."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.generation.continuous_batching import model_runner

from hf_fastattn.interface import counters
from tests.stock_batching.served import NEW, alone, assert_in_place, batched, batching, greedy, pair, prompts


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_pieces_of_prompts_and_a_full_cache(name: str) -> None:
    stock, model = pair(name)
    given = prompts(12, 90)
    config = batching(8, 400, 24)
    assert batched(model, given, config=config) == alone(stock, given)
    assert counters.batches["decode: pages in place"] > 0, counters


def test_shared_prefixes_and_forks() -> None:
    stock, model = pair("llama")
    common = prompts(1, seed=5, longest=70)[0] + list(range(1, 40))
    given = [common + rest for rest in prompts(5, 20)]
    config = batching(8, most=64)
    assert batched(model, given, config=config) == alone(stock, given)
    assert_in_place()
    stock.set_attn_implementation("sdpa")
    twice = batched(model, given[:2], config=config, copies=3)
    assert twice == batched(stock, given[:2], config=config, copies=3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_requests_longer_than_the_block_table(name: str) -> None:
    stock, model = pair(name)
    given = prompts(4, 60)
    assert batched(model, given, config=batching(8, max_blocks_per_request=3)) == alone(stock, given)
    read = "windows gathered" if name == "gemma3" else "pages in place"
    # Full layers still read pages in place; of sliding ones no more than the window is copied.
    assert counters.batches[f"decode: {read}"] > 0 and set(counters.kernels) == {"reference"}, counters


@pytest.mark.parametrize("columns", [3, 11, 12, 13])
def test_block_tables_of_any_width(columns: int) -> None:
    stock, model = pair("gemma3")
    given = [[7], *prompts(3, 60)]
    assert batched(model, given, 30, batching(8, max_blocks_per_request=columns)) == alone(stock, given, 30)
    assert (counters.batches["decode: pages in place"] > 0) == (columns > 3), counters


@pytest.fixture
def padded_as_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards have rows and tokens that are padding, as where they are recorded."""
    made = model_runner.ModelRunner.__init__

    def padding(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(model_runner.ModelRunner, "__init__", padding)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.usefixtures("padded_as_for_graphs")
def test_padding(name: str) -> None:
    stock, model = pair(name)
    given = prompts(5, 60)
    config = batching(8, 1024, max_requests_per_batch=8, q_padding_interval_size=16, kv_padding_interval_size=64)
    assert batched(model, given, config=config) == alone(stock, given)
    assert counters.batches["decode: pages in place"] > 0, counters


@pytest.mark.usefixtures("padded_as_for_graphs")
def test_warming_up_reads_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.24 Transformers warms up with a request that fills the cache, which takes seconds on a large GPU."""
    create, pasts = model_runner.create_warmup_future_states, []

    def noted(num: int, status: Any, num_q_tokens: int, past: int, cache: Any) -> Any:
        pasts.append(past)
        return create(num, status, num_q_tokens, past, cache)

    monkeypatch.setattr(model_runner, "create_warmup_future_states", noted)
    batched(pair("llama")[1], prompts(2), config=batching(8, 1024, max_requests_per_batch=4))
    assert pasts and max(pasts) <= 8, pasts


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.usefixtures("padded_as_for_graphs")
def test_padding_in_the_interpreter(name: str) -> None:
    stock, model = pair(name)
    given = prompts(3, 30)
    config = batching(8, 512, 64, max_requests_per_batch=4, q_padding_interval_size=16, kv_padding_interval_size=64)
    assert batched(model, given, 8, config) == alone(stock, given, 8)
    assert counters.batches["decode: pages in place"] > 0 and set(counters.kernels) == {"triton"}, counters


def test_streaming_and_cancelling() -> None:
    stock, model = pair("gemma3")
    given = prompts(3, 40)
    want = alone(stock, given)
    with model.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=batching()
    ) as manager:
        assert model.config._attn_implementation == "fastattn"
        names = [manager.add_request(prompt, max_new_tokens=NEW, streaming=True) for prompt in given]
        manager.cancel_request(names[1])
        found: dict[str, list[int]] = {names[0]: [], names[2]: []}
        done: set[str] = set()
        while done != {names[0], names[2]}:
            output = manager.get_result(timeout=1)
            if output is not None and output.request_id in found:
                found[output.request_id] = output.generated_tokens
                done |= {output.request_id} if output.is_finished() else set()
    assert [found[names[0]], found[names[2]]] == [want[0], want[2]]
    # The model goes on as it was.
    assert alone(model, given) == want
    assert model.config._attn_implementation == "fastattn"
