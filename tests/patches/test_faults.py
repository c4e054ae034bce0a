"""The equality tests can fail: each fault planted in our path changes the tokens of the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.attention import read_plan, reference, rope_reference
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.patches.decoder import forward as decoder
from tests.tools.models import CORE, assert_fast, padded_batch, pair, single

# Large enough that a window never releases a page: a wider window then reads an old key, not freed memory.
WIDE_PAGES = {"page_size": 128}


def generate(model: Any, samples: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    if samples > 1:
        options = {"do_sample": True, "temperature": 1.5, "top_k": 0}
        return model.generate(**single(), max_new_tokens=24, num_return_sequences=samples, **options)
    return model.generate(**padded_batch(), max_new_tokens=32, do_sample=False)


def pages_swapped_between_rows(plan: ReadPlan) -> ReadPlan:
    """Two rows exchange the page before their newest one."""
    pages = [list(row) for row in plan.pages]
    a, b = ((length - 1) // plan.page_size - 1 for length in plan.seq_lens[:2])
    pages[0][a], pages[1][b] = pages[1][b], pages[0][a]
    return replace(plan, pages=pages)


def newest_pages_swapped(plan: ReadPlan) -> ReadPlan:
    """A row's two newest pages change places, the last one being partial."""
    pages = [list(row) for row in plan.pages]
    last = (plan.seq_lens[0] - 1) // plan.page_size
    pages[0][last - 1], pages[0][last] = pages[0][last], pages[0][last - 1]
    return replace(plan, pages=pages)


def newest_key_dropped(plan: ReadPlan) -> ReadPlan:
    window = None if plan.window is None else plan.window - 1
    return replace(plan, seq_lens=[length - 1 for length in plan.seq_lens], window=window)


PLAN_FAULTS = [pages_swapped_between_rows, newest_pages_swapped, newest_key_dropped]


class Planted:
    """Counts how often a fault was in force."""

    def __init__(self) -> None:
        self.times = 0


@pytest.fixture
def planted() -> Planted:
    return Planted()


def plant_in_plan(
    monkeypatch: pytest.MonkeyPatch,
    planted: Planted,
    change: Callable[[ReadPlan], ReadPlan],
    when: Callable[[ReadPlan], bool],
) -> None:
    """Decode attention reads by a changed plan."""
    launch = reference.paged_attention

    def faulty(q: Any, k_pages: Any, v_pages: Any, plan: ReadPlan, **kwargs: Any) -> Any:
        if plan.is_decode and when(plan):
            planted.times += 1
            plan = change(plan)
        return launch(q, k_pages, v_pages, plan, **kwargs)

    monkeypatch.setattr(reference, "paged_attention", faulty)


def assert_noticed(
    family: str,
    planted: Planted,
    plant: Callable[[], None],
    options: dict[str, Any] | None = None,
    samples: int = 1,
) -> None:
    """Equal to stock before the fault is planted, different after."""
    stock, model = pair(family, options)
    expected = generate(stock, samples)
    assert torch.equal(generate(model, samples), expected)
    assert_fast(model)
    plant()
    assert not torch.equal(generate(model, samples), expected)
    assert planted.times > 0


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("change", PLAN_FAULTS)
def test_page_table_faults(
    family: str,
    change: Callable[[ReadPlan], ReadPlan],
    monkeypatch: pytest.MonkeyPatch,
    planted: Planted,
) -> None:
    def enough_pages(plan: ReadPlan) -> bool:
        return min(plan.seq_lens[:2]) > 2 * plan.page_size

    assert_noticed(family, planted, lambda: plant_in_plan(monkeypatch, planted, change, enough_pages))


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("family", ["qwen2_window", "mistral_window", "ministral", "qwen2_moe", "qwen3_window"])
def test_window_faults(family: str, shift: int, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    def shifted(plan: ReadPlan) -> ReadPlan:
        assert plan.window is not None
        return replace(plan, window=plan.window + shift)

    def windowed(plan: ReadPlan) -> bool:
        return plan.window is not None

    assert_noticed(
        family,
        planted,
        lambda: plant_in_plan(monkeypatch, planted, shifted, windowed),
        WIDE_PAGES,
    )


@pytest.mark.parametrize("decode_only", [False, True])
@pytest.mark.parametrize("family", CORE)
def test_scale_fault(family: str, decode_only: bool, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    launch = reference.paged_attention

    def faulty(*args: Any, scale: float, **kwargs: Any) -> Any:
        if args[3].is_decode or not decode_only:
            planted.times += 1
            scale *= 1.1
        return launch(*args, scale=scale, **kwargs)

    assert_noticed(family, planted, lambda: monkeypatch.setattr(reference, "paged_attention", faulty))


@pytest.mark.parametrize("family", CORE)
def test_head_order_fault(family: str, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """Query heads dealt out to the key heads in turn, instead of in blocks."""
    launch = reference.paged_attention

    def faulty(q: Any, *args: Any, **kwargs: Any) -> Any:
        planted.times += 1
        out, lse = launch(q[:, [0, 2, 1, 3]], *args, **kwargs)
        return out[:, [0, 2, 1, 3]], lse

    assert_noticed(family, planted, lambda: monkeypatch.setattr(reference, "paged_attention", faulty))


@pytest.mark.parametrize("family", CORE)
def test_position_fault(family: str, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """Generated tokens stand one further on than they are; RoPE is relative, so the prompt stays."""
    prepare = decoder._packed_arguments

    def faulty(*args: Any) -> dict[str, Any]:
        arguments = prepare(*args)
        if arguments["position_ids"].shape[1] == 1:
            planted.times += 1
            arguments["position_ids"] = arguments["position_ids"] + 1
        return arguments

    assert_noticed(family, planted, lambda: monkeypatch.setattr(decoder, "_packed_arguments", faulty))


@pytest.mark.parametrize("family", CORE)
def test_slot_fault(family: str, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """Once, in one layer, the keys of two rows are written to each other's slots."""
    launch = rope_reference.rope_append

    def faulty(*args: Any, **norms: Any) -> Any:
        slots = args[-1]
        if slots.shape[0] == 3:
            planted.times += 1
            if planted.times == 10:
                slots = slots[[1, 0, 2]]
        return launch(*args[:-1], slots, **norms)

    assert_noticed(family, planted, lambda: monkeypatch.setattr(rope_reference, "rope_append", faulty))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merge_fault(family: str, monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """A shared prefix is merged as if both parts weighed the same."""
    merge = reference.merge_states
    # Prompts here are short.
    monkeypatch.setattr(read_plan, "MIN_SHARED_ELEMENTS", 0)

    def faulty(out: Any, lse: Any, other_out: Any, other_lse: Any) -> Any:
        planted.times += 1
        return merge(out, lse, other_out, lse)

    assert_noticed(
        family,
        planted,
        lambda: monkeypatch.setattr(reference, "merge_states", faulty),
        samples=8,
    )
