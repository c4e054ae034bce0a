"""Running batches: every request gets the tokens that generate() gives its prompt alone, whoever else comes and goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_fastattn.batching import engine as engine_module
from hf_fastattn.batching import running_batch
from tests.batching.served import NEW, Driven, Twins, prompts

FAMILIES = ("llama", "qwen2_window", "mistral_window", "qwen3_moe", "qwen2_vl", "exaone4")
PAGE = 4


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are computed in several pieces, and rows get few pages at a time."""
    monkeypatch.setattr(engine_module, "PIECE", 8)
    monkeypatch.setattr(running_batch, "AHEAD", 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_requests(family: str, device: str) -> None:
    twins = Twins(family, device)
    driven, given = Driven(twins, max_batch_tokens=48), prompts(20)
    limits = [1 + 3 * (place % 9) for place in range(len(given))]
    for place, (prompt, new) in enumerate(zip(given, limits, strict=True)):
        driven.add(str(place), prompt, new)
    driven.run()
    for place, (prompt, new) in enumerate(zip(given, limits, strict=True)):
        assert driven.tokens(str(place)) == twins.alone(prompt, new)
    counters = driven.release()
    assert counters.requests_batched == len(given) and not counters.fallbacks
    # Rows run side by side: far fewer steps than tokens.
    assert counters.batch_steps < sum(limits) / 4


def test_few_slots(device: str) -> None:
    """More requests than slots: who ends makes place for who waits."""
    twins = Twins("llama", device)
    driven, given = Driven(twins, max_requests_per_batch=3), prompts(9)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(9)] == [twins.alone(prompt) for prompt in given]
    driven.release()
    # First come, first served.
    ended = [driven.outputs[str(place)][-1].lifespan[1] for place in range(9)]
    assert max(ended[:3]) <= min(ended[6:])


def test_ends_and_limits(device: str) -> None:
    twins = Twins("llama", device)
    driven, given, ends = Driven(twins), prompts(12), tuple(range(3, 128, 9))
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, eos_token_id=list(ends) if place % 2 else -1)
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, ends=ends if place % 2 else ())
    assert any(len(driven.tokens(str(place))) < NEW for place in range(1, 12, 2))
    driven.release()


def test_no_limit_of_new_tokens(device: str) -> None:
    twins = Twins("llama", device)
    driven, ends = Driven(twins), tuple(range(3, 128, 9))
    driven.add("endless", [5, 6, 7], None, eos_token_id=list(ends))
    driven.run()
    assert driven.tokens("endless") == twins.alone([5, 6, 7], 200, ends)
    driven.release()


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_cancellations_and_page_pressure(seed: int, device: str) -> None:
    """Pages for a third of what all requests need: some start over, and none loses a token."""
    rng = np.random.default_rng(seed)
    family = FAMILIES[seed % 3]
    twins, given = Twins(family, device, page_size=PAGE), prompts(12, seed % 3, 40)
    needed = sum(len(prompt) + NEW for prompt in given)
    driven = Driven(twins, max(needed // 3, 20 * PAGE), max_batch_tokens=24)
    cancelled, waiting = set(), list(enumerate(given))
    while waiting or not driven.engine.is_idle:
        for place, prompt in waiting[: rng.integers(0, 4)]:
            driven.add(str(place), prompt)
            waiting.remove((place, prompt))
        if rng.random() < 0.1:
            name = str(rng.integers(0, len(given)))
            cancelled.add(name)
            driven.engine.cancel([name])
        driven.run(int(rng.integers(1, 6)))
    for place, prompt in enumerate(given):
        if str(place) in driven.outputs:
            assert driven.tokens(str(place)) == twins.alone(prompt)
        else:
            assert str(place) in cancelled
    driven.release()


def test_oldest_first_under_page_pressure(device: str) -> None:
    twins, given = Twins("llama", device, page_size=PAGE), prompts(8, 3, 20)
    driven = Driven(twins, 24 * PAGE)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(8)] == [twins.alone(prompt) for prompt in given]
    assert driven.release().requests_preempted > 0


def test_what_never_fits_fails_alone(device: str) -> None:
    twins = Twins("llama", device, page_size=PAGE)
    driven = Driven(twins, 12 * PAGE)
    driven.add("long", list(range(1, 60)))
    driven.add("grows", [3, 4, 5], 80)
    driven.add("fits", [7, 8, 9])
    driven.add("nothing", [])
    driven.run()
    assert driven.tokens("fits") == twins.alone([7, 8, 9])
    assert "12" in driven.outputs["long"][-1].error and "no prompt" in driven.outputs["nothing"][-1].error
    grown = driven.outputs["grows"][-1]
    assert "pages" in grown.error and grown.generated_tokens == twins.alone([3, 4, 5], 80)[: len(grown.generated_tokens)]
    assert len(grown.generated_tokens) > 20
    driven.release()


def test_pages_that_a_returned_cache_holds(device: str) -> None:
    """A request that nobody would ever make place for fails, instead of waiting for ever; the next one does not."""
    twins, (prompt,) = Twins("llama", device, page_size=PAGE, memory_limit=160 * 1024), prompts(1, 5, 60)
    ids = torch.tensor([prompt * 3], device=twins.model.device)
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    held = twins.model.generate(ids, **given)
    driven = Driven(twins)
    driven.add("late", prompt * 3)
    driven.run(50)
    assert "caches outside of the batch hold" in driven.outputs["late"][-1].error
    held.past_key_values.reset()
    driven.add("again", prompt * 3)
    driven.run()
    assert driven.tokens("again") == twins.alone(prompt * 3)
    driven.release()


def test_a_prompt_alone_is_not_cut(device: str) -> None:
    """Pieces are short where rows wait for them: a prompt that nobody waits beside is computed in the longest ones."""
    twins, prompt = Twins("llama", device), prompts(1, 5, 60)[0] * 4
    driven = Driven(twins, max_batch_tokens=16)
    driven.add("long", prompt, 2)
    driven.run()
    assert driven.tokens("long") == twins.alone(prompt, 2)
    assert driven.release().forwards == -(-len(prompt) // 16) > engine_module.MOST_WAITED + 1


def test_pages_behind_windows_are_free(device: str) -> None:
    """Rows together are longer than all pages, and so is the next request of a slot."""
    twins, given = Twins("mistral_window", device, page_size=PAGE), prompts(6, 3, 16)
    driven = Driven(twins, 20 * PAGE, max_requests_per_batch=2)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 70)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(6)] == [twins.alone(prompt, 70) for prompt in given]
    assert driven.release().requests_preempted == 0


def test_equal_prompts_are_computed_once(device: str) -> None:
    twins, prompt = Twins("llama", device, page_size=PAGE), prompts(1, 5, 60)[0] * 3
    driven = Driven(twins)
    driven.add("many", prompt, num_children=4)
    driven.run()
    names = ["many", *(f"many__child#{child}" for child in range(4))]
    assert [driven.tokens(name) for name in names] == [twins.alone(prompt)] * 5
    counters = driven.release()
    assert counters.prompt_tokens < 1.5 * len(prompt) and counters.tokens_reused > 3 * len(prompt)


def test_prompts_of_generate_are_found(device: str) -> None:
    """With `prefix_cache`, batches and generate() find each other's pages, as long as the weights are the same."""
    twins, prompt = Twins("llama", device, page_size=PAGE, prefix_cache=True), prompts(1, 5, 60)[0] * 3
    ids = torch.tensor([prompt], device=twins.model.device)
    twins.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    for scale, reused in ((1.0, True), (-1.0, False)):
        for model in (twins.stock, twins.model):
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(scale)
        twins.changed()
        driven = Driven(twins)
        driven.add("again", prompt)
        driven.run()
        assert driven.tokens("again") == twins.alone(prompt)
        counters = twins.report.last_call
        driven.parts.release(driven.engine)
        assert (counters.tokens_reused > len(prompt) // 2) == reused
        assert twins.report.pages_in_use == twins.report.pages_kept
    twins.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert twins.report.last_call.tokens_reused > len(prompt) // 2


def test_rows_move_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When many rows have ended, the others go on in a smaller step."""
    from hf_fastattn.batching import device_steps

    monkeypatch.setattr(device_steps, "WORTH_CAPTURING", 1)
    twins, given = Twins("llama", device), prompts(12, 7)
    driven = Driven(twins)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 3 if place % 4 else 40)
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, 3 if place % 4 else 40)
    driven.release()


def test_rows_longer_than_the_tables(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastattn.loop import device_state

    monkeypatch.setattr(device_state, "MIN_COLUMNS", 4)
    twins, given = Twins("llama", device, page_size=PAGE), prompts(6, 8, 30)
    driven = Driven(twins)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 40)
        driven.run(2)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(6)] == [twins.alone(prompt, 40) for prompt in given]
    driven.release()


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen2_vl"])
def test_a_long_prompt_beside_rows(family: str, device: str, request: pytest.FixtureRequest) -> None:
    """Its pieces are recorded, the last one filled up, and rows go on between them."""
    twins, given = Twins(family, device, page_size=PAGE), prompts(10, 13, 20)
    driven, long = Driven(twins), prompts(1, 5, 60)[0] * 4 + [7, 8, 9]
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 60)
    driven.run(3)
    for place in range(2):
        driven.add(f"long {place}", [place + 1, *long], 5)
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, 60)
    for place in range(2):
        assert driven.tokens(f"long {place}") == twins.alone([place + 1, *long], 5)
    counters = driven.release()
    assert counters.batch_steps > len(long) // 8 and not counters.uncaptured
    if "host" not in request.node.name:
        assert counters.appends_replayed > len(long) // 8


@pytest.mark.parametrize("watched", ["streaming", "record_timestamps"])
def test_watched_requests(device: str, watched: str) -> None:
    twins, given = Twins("llama", device), prompts(4, 9)
    driven = Driven(twins)
    for place, prompt in enumerate(given):
        options: dict[str, Any] = {watched: True} if place % 2 else {}
        driven.add(str(place), prompt, **options)
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt)
        shown = driven.outputs[str(place)]
        assert len(shown) == (NEW if watched == "streaming" and place % 2 else 1)
        assert [len(one.generated_tokens) for one in shown] == list(range(NEW + 1))[-len(shown) :]
        times = shown[-1].timestamps
        assert times is None or len(times) == NEW
    driven.release()


def test_new_pages_move_nothing_that_is_read(device: str) -> None:
    """The pool grows while rows run."""
    twins, given = Twins("qwen2", device, page_size=PAGE), prompts(10, 11)
    driven = Driven(twins)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt)
        driven.run(3)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(10)] == [twins.alone(prompt) for prompt in given]
    driven.release()


def test_memory_runs_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost where there is memory again for less."""
    twins, given = Twins("llama", device, page_size=PAGE), prompts(8, 12)
    driven, plain, calls = Driven(twins), engine_module.compute_pieces, []

    def scarce(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 3, 4, 9):
            raise torch.OutOfMemoryError("planted")
        return plain(*args)

    monkeypatch.setattr(engine_module, "compute_pieces", scarce)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt)
        driven.run(1)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(8)] == [twins.alone(prompt) for prompt in given]
    driven.release()
    monkeypatch.setattr(engine_module, "compute_pieces", lambda *args: scarce(*calls.clear() or args))
    driven = Driven(twins)
    driven.add("hopeless", given[0])
    with pytest.raises(torch.OutOfMemoryError):
        driven.run()
    driven.release()
