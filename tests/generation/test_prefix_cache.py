"""Pages of earlier calls under prompts that begin as theirs: what is computed, what stays, what is let go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from tests.generation.calls import SAMPLING, assert_same_tokens, run
from tests.tools.models import VOCAB, assert_fast, noisy, padded_batch, pair, single, tiny

KEPT = {"prefix_cache": True}
SIZE = 16


def assert_computed(model: Any, computed: int, reused: int) -> None:
    call = assert_fast(model, prompt_tokens=computed, held=None)
    assert call.tokens_reused == reused
    assert call.prefix_unused == {}


def longer(ids: torch.Tensor, count: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """`ids [B, S]` and `count` more tokens a row."""
    more = torch.randint(1, VOCAB, (len(ids), count), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((ids, more), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "mixtral"])
def test_the_same_prompt_again(family: str) -> None:
    stock, model = pair(family, KEPT)
    batch = padded_batch(3, 70)
    assert_same_tokens(stock, model, batch, 20)
    assert_computed(model, 70 + 40 + 9, 0)
    assert_same_tokens(stock, model, batch, 20)
    # Of the shortest row, no page was full; of the others all but the last token is there.
    assert_computed(model, 1 + 1 + 9, 69 + 39)


def test_nothing_stays_unless_asked_for() -> None:
    model = pair("llama")[1]
    for _ in range(2):
        run(model, single(70))
        assert assert_fast(model, 70).tokens_reused == 0


def test_twenty_turns_compute_what_is_new() -> None:
    stock, model = pair("llama", KEPT)
    ids, known = single(50)["input_ids"], 0
    for turn in range(20):
        batch = longer(ids, 6, seed=turn)
        ids = assert_same_tokens(stock, model, batch, 9)
        new = batch["input_ids"].shape[1]
        assert_computed(model, new - known, known)
        # The last token that was chosen has not been computed.
        known = ids.shape[1] - 1
    assert hf_fastattn.report(model).pages_in_use < ids.shape[1] / SIZE + 2


def test_turns_of_a_padded_batch() -> None:
    stock, model = pair("qwen2", KEPT)
    batch = padded_batch(3, 60)
    lengths = batch["attention_mask"].sum(1)
    tokens = assert_same_tokens(stock, model, batch, 33)
    more = torch.randint(1, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 38, dtype=torch.int64)), 1)
    assert_same_tokens(stock, model, {"input_ids": torch.cat((tokens, more), 1), "attention_mask": mask}, 20)
    assert_computed(model, 3 * 6, int(lengths.sum()) + 3 * 32)


def test_other_padding_and_another_order() -> None:
    stock, model = pair("llama", KEPT)
    batch = padded_batch(3, 70)
    run(model, batch)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (13, 0)).flip(0),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (13, 0)).flip(0),
    }
    assert_same_tokens(stock, model, wider)
    assert_computed(model, 9 + 1 + 1, 39 + 69)


def test_a_prompt_that_goes_another_way_in_the_middle_of_a_page() -> None:
    stock, model = pair("llama", KEPT)
    batch = single(70)
    run(model, batch)
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][0, 40] = (other["input_ids"][0, 40] + 1) % VOCAB
    assert_same_tokens(stock, model, other)
    assert_computed(model, 30, 40)
    # The page that was copied has not changed under the first prompt.
    assert_same_tokens(stock, model, batch)
    assert_computed(model, 1, 69)


def test_less_than_a_page_is_computed() -> None:
    stock, model = pair("llama", KEPT)
    run(model, single(70))
    other = single(70, seed=7)
    other["input_ids"][0, :12] = single(70)["input_ids"][0, :12]
    assert_same_tokens(stock, model, other)
    assert_computed(model, 70, 0)


def test_samples_and_beams() -> None:
    stock, model = pair("llama", KEPT)
    batch = padded_batch(2, 70)
    assert_same_tokens(stock, model, batch, 20, num_return_sequences=4, **SAMPLING)
    for options in ({"num_return_sequences": 4, **SAMPLING}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}):
        assert_same_tokens(stock, model, batch, 20, **options)
        assert_computed(model, 1 + 9, 69)


def test_what_each_sample_has_generated_stays() -> None:
    stock, model = pair("llama", KEPT)
    tokens = assert_same_tokens(stock, model, single(40), 41, num_return_sequences=3, **SAMPLING)
    assert_same_tokens(stock, model, longer(tokens, 4), 12)
    assert_computed(model, 3 * 5, 3 * 80)


def test_the_returned_cache_is_the_users() -> None:
    stock, model = pair("llama", KEPT)
    batch = single(45)
    given = run(model, batch, 20, return_dict_in_generate=True)
    cache = getattr(given, "cache", None) or given.past_key_values
    # Written on by its owner, in a page whose first tokens the next calls find.
    ids = longer(given.sequences, 9)
    first = model.generate(**ids, past_key_values=cache, max_new_tokens=10)
    assert_same_tokens(stock, model, longer(given.sequences, 9, seed=8), 10)
    assert_computed(model, 10, 64)
    assert torch.equal(first, stock.generate(**ids, max_new_tokens=10))


def test_assistants_leave_it_alone() -> None:
    stock, model = pair("llama", KEPT)
    helper = noisy(tiny("llama"))
    run(model, single(60))
    assert_same_tokens(stock, model, single(60), 20, assistant_model=helper)


def test_the_least_recently_used_pages_go_first() -> None:
    limit = 2 * 3 * SIZE * 2 * 16 * 4 * 18
    stock, model = pair("llama", {**KEPT, "memory_limit": limit})
    prompts = [single(70, seed=seed) for seed in range(5)]
    for prompt in prompts[:3]:
        run(model, prompt, 10)
    # The first one is used again, so the second one is the oldest.
    assert_same_tokens(stock, model, prompts[0], 10)
    assert_computed(model, 1, 69)
    assert_same_tokens(stock, model, prompts[3], 10)
    call = assert_fast(model, 70, held=None)
    assert call.prefix_pages_evicted > 0
    assert_same_tokens(stock, model, prompts[0], 10)
    assert_computed(model, 1, 69)
    assert_same_tokens(stock, model, prompts[1], 10)
    assert hf_fastattn.report(model).last_call.tokens_reused < 69


def test_a_call_may_have_all_that_the_limit_allows() -> None:
    limit = 2 * 3 * SIZE * 2 * 16 * 4 * 12
    stock, model = pair("llama", {**KEPT, "memory_limit": limit})
    for seed in range(6):
        assert_same_tokens(stock, model, single(150, seed=seed), 20)


def test_release_memory_gives_everything_back() -> None:
    model = pair("llama", KEPT)[1]
    run(model, single(70))
    report = hf_fastattn.report(model)
    assert report.pages_in_use == report.pages_kept > 0
    hf_fastattn.release_memory(model)
    report = hf_fastattn.report(model)
    assert (report.pages_in_use, report.pages_kept, report.page_bytes_allocated) == (0, 0, 0)
    run(model, single(70))
    assert_computed(model, 70, 0)


def test_memory_is_not_released_under_a_call() -> None:
    model = pair("llama", KEPT)[1]

    class Streamer:
        def put(self, value: Any) -> None:
            hf_fastattn.release_memory(model)

        def end(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="during a generate"):
        run(model, single(70), streamer=Streamer())
    hf_fastattn.release_memory(model)
    assert hf_fastattn.report(model).page_bytes_allocated == 0
    hf_fastattn.release_memory(tiny("llama"))


@pytest.mark.parametrize("weights", ["check", "frozen"])
def test_train_mode_neither_finds_nor_keeps(weights: str) -> None:
    model = pair("llama", {**KEPT, "weights": weights})[1]
    run(model, single(70))
    model.train()
    with torch.no_grad():
        run(model, single(70))
    assert assert_fast(model, 70).tokens_reused == 0
    model.eval()
    run(model, single(70))
    assert_computed(model, 70, 0)


@pytest.mark.parametrize(
    ("family", "over", "options", "reason"),
    [
        ("qwen2_window", {}, {}, "sliding window"),
        ("qwen3_next", {}, {}, "linear-attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {},
            "depend on the length",
        ),
        ("llama", {}, {"output_hidden_states": True, "return_dict_in_generate": True}, "states of the prompt"),
        ("llama", {}, {"prefill_chunk_size": 20}, "in pieces"),
        ("llama", {}, {"position_ids": torch.arange(3, 73)[None]}, "do not count"),
    ],
)
def test_what_is_not_shared_is_counted(family: str, over: Any, options: Any, reason: str) -> None:
    stock, model = pair(family, KEPT, **over)
    for _ in range(2):
        expected, tokens = (run(one, single(70), **options) for one in (stock, model))
        same = (tokens, expected) if isinstance(expected, torch.Tensor) else (tokens.sequences, expected.sequences)
        assert torch.equal(*same)
        call = hf_fastattn.report(model).last_call
        assert call.tokens_reused == 0
        assert [name for name in call.prefix_unused if reason in name], call.prefix_unused


def test_a_hook_that_looks_sees_the_whole_prompt() -> None:
    stock, model = pair("llama", KEPT)
    run(model, single(70))
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    assert_same_tokens(stock, model, single(70))
    handle.remove()
    assert seen[0] == 70
    assert_same_tokens(stock, model, single(70))
    assert_computed(model, 1, 69)


def test_embeddings_are_not_looked_up() -> None:
    stock, model = pair("llama", KEPT)
    run(model, single(70))
    inputs = {"inputs_embeds": stock.get_input_embeddings()(single(70)["input_ids"]).detach()}
    assert torch.equal(run(model, inputs), run(stock, inputs))
    assert hf_fastattn.report(model).last_call.prefix_unused


def test_an_exception_in_the_middle_leaks_nothing() -> None:
    stock, model = pair("llama", KEPT)
    run(model, single(70))

    class Stops(Exception):
        pass

    class Streamer:
        def put(self, value: Any) -> None:
            if value.ndim == 1 and value.numel() == 1:
                raise Stops

        def end(self) -> None:
            pass

    kept = hf_fastattn.report(model).pages_in_use
    with pytest.raises(Stops):
        run(model, single(70), streamer=Streamer())
    assert hf_fastattn.report(model).pages_in_use == kept
    assert_same_tokens(stock, model, single(70))
    assert_computed(model, 1, 69)


def test_pages_that_stay_move_ever_less_often() -> None:
    """Each time they move, all are copied and steps are recorded anew."""
    model = pair("llama", KEPT)[1]
    versions = []
    document = single(100)["input_ids"]
    for number in range(24):
        run(model, longer(document.expand(4, -1), 40, seed=number), max_new_tokens=4)
        versions.append(model._fastattn.runtime.groups.storage_version)
    # At first a pool has what its first call needs; then it grows by half, or by more than these calls need.
    assert len(set(versions)) <= 5
