"""The shipped checkpoint: it loads, it recalls, and a fault in our path shows as lost recall."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.checkpoint.recall import recall_prompts
from hf_fastattn.kernels.attention import reference, rope_reference

WEIGHTS = Path(hf_fastattn.__file__).parent / "eval" / "checkpoint" / "weights"
LENGTH = 512


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model, AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture
def checkpoint(loaded: tuple[Any, Any]) -> Any:
    yield loaded
    hf_fastattn.unpatch(loaded[0])


def answers(model: Any, tokenizer: Any, task: str) -> tuple[torch.Tensor, float]:
    """The tokens generated after 12 prompts of three depths, and the share that is exactly right."""
    prompts = [p for depth in (0.1, 0.5, 0.9) for p in recall_prompts(tokenizer, task, LENGTH, depth, 4)]
    ids = torch.tensor([list(p.prompt) for p in prompts])
    wanted = torch.tensor([list(p.answer) for p in prompts])
    mask = torch.ones_like(ids)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=wanted.shape[1], do_sample=False)[:, LENGTH:]
    return new, (new == wanted).all(1).float().mean().item()


@pytest.mark.parametrize("task", ["needle", "lookup"])
def test_recall_equals_stock(checkpoint: Any, task: str) -> None:
    model, tokenizer = checkpoint
    want, share = answers(model, tokenizer, task)
    assert share >= 0.9
    hf_fastattn.patch(model)
    got, _ = answers(model, tokenizer, task)
    assert torch.equal(got, want)
    call = hf_fastattn.report(model).last_call
    assert call is not None and call.forwards > 0 and not call.fallbacks and call.prompt_tokens == 12 * LENGTH


def pages_one_column_off(launch: Any, *args: Any, **kwargs: Any) -> Any:
    q, k_pages, v_pages, plan = args
    pages = [[*row[1:], row[0]] for row in plan.pages]
    return launch(q, k_pages, v_pages, replace(plan, pages=pages), **kwargs)


def values_of_the_next_page(launch: Any, *args: Any, **kwargs: Any) -> Any:
    q, k_pages, v_pages, plan = args
    return launch(q, k_pages, v_pages.roll(1, 0), plan, **kwargs)


def all_but_the_newest_masked(launch: Any, *args: Any, **kwargs: Any) -> Any:
    q, k_pages, v_pages, plan = args
    return launch(q, k_pages, v_pages, replace(plan, window=40), **kwargs)


@pytest.mark.parametrize("task", ["needle", "lookup"])
@pytest.mark.parametrize("fault", [pages_one_column_off, values_of_the_next_page, all_but_the_newest_masked])
def test_page_and_mask_faults_drop_recall(checkpoint: Any, monkeypatch: Any, task: str, fault: Any) -> None:
    model, tokenizer = checkpoint
    under_way: list[Any] = []

    def faulty(launch: Any, *args: Any, **kwargs: Any) -> Any:
        # One calls the other.
        if under_way:
            return launch(*args, **kwargs)
        under_way.append(launch)
        try:
            return fault(launch, *args, **kwargs)
        finally:
            under_way.clear()

    for name in ("paged_attention", "paged_output"):
        monkeypatch.setattr(reference, name, functools.partial(faulty, getattr(reference, name)))
    _, share = answers(hf_fastattn.patch(model), tokenizer, task)
    assert share <= 0.5


@pytest.mark.parametrize("task", ["needle", "lookup"])
def test_position_fault_drops_recall(checkpoint: Any, monkeypatch: Any, task: str) -> None:
    """Every second prompt token one position late. A shift of all would show nowhere: RoPE is relative."""
    model, tokenizer = checkpoint
    launch = rope_reference.rope_append

    def late(q: Any, k: Any, v: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        odd = (torch.arange(len(q)) % 2 == 1)[:, None]
        cos, sin = (torch.where(odd, table.roll(-1, 0), table) for table in (cos, sin))
        return launch(q, k, v, cos, sin, *args, **kwargs)

    monkeypatch.setattr(rope_reference, "rope_append", late)
    _, share = answers(hf_fastattn.patch(model), tokenizer, task)
    assert share <= 0.5
