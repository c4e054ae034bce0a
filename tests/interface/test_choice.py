"""`attn_implementation="fastattn"` costs no more than Transformers' own attention: what runs which, operations counted."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn import interface
from hf_fastattn.dense import choice
from hf_fastattn.dense.causal_layout import CausalLayout
from hf_fastattn.dense.choice import ONE_LAUNCH, SMALL_ON_CPU, why_stock_is_enough
from hf_fastattn.dense.stock_attention import stock_attention
from hf_fastattn.interface import attention_forward, counters
from hf_fastattn.transformers_version import CACHE
from tests.interface.operations import Operations
from tests.interface.tiny import NEW, build_pair, tokens
from tests.tools.models import padded_batch, tiny


def step_operations(model: Any, padded: bool, layers: int) -> float:
    """Operations of a layer in a decode step."""
    found = []
    for count in (layers, 2 * layers):
        changed = model(count)
        batch = padded_batch(3, 20)
        if not padded:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        with torch.no_grad():
            cache = changed(**batch, use_cache=True)[CACHE]
            mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)), 1)
            with Operations() as operations:
                changed(batch["input_ids"][:, -1:], attention_mask=mask, **{CACHE: cache}, use_cache=True)
        found.append(sum(operations.counts.values()))
    return (found[1] - found[0]) / layers


def operations_of_both(name: str, padded: bool) -> list[float]:
    def built(which: int) -> Any:
        return lambda layers: build_pair(name, num_hidden_layers=layers)[which]

    return [step_operations(built(which), padded, 2) for which in (0, 1)]


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_has_no_more_operations_than_stocks(padded: bool) -> None:
    stock, ours = operations_of_both("llama", padded)
    assert ours <= stock


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_step_launches_less_than_stocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.tools.fake_driver import FakeDriver, fake_driver
    from tests.tools.targets import TARGETS

    launches: list[int] = []
    make = FakeDriver.launcher_cls
    monkeypatch.setattr(interface, "_backend", lambda *given: ("triton", None))
    monkeypatch.setattr(interface, "why_stock_is_enough", lambda *given: None)
    monkeypatch.setattr(FakeDriver, "launcher_cls", lambda *given: (make(*given), lambda *args: launches.append(1))[1])
    with fake_driver(TARGETS["sm_90"]):
        stock, ours = operations_of_both(name, padded=True)
    # Two layers and four; a launch each in the prompt, and one in the step.
    assert len(launches) == 2 * (2 + 4)
    # Stock repeats keys and values, and launches products, softcap, mask and softmax one by one; ours is one more.
    assert ours + 1 < stock


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_plain_call_is_sdpas(name: str) -> None:
    stock, model = build_pair(name)
    # The token for padding would be taken for it.
    ids = {"input_ids": padded_batch(2, 12)["input_ids"].clamp(min=1)}
    assert torch.equal(tokens(model, ids, max_new_tokens=8), tokens(stock, ids, max_new_tokens=8))
    assert not counters.kernels and counters.fallbacks == {ONE_LAUNCH: 3 * 8}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_small_padded_call_is_stocks_on_a_cpu(name: str) -> None:
    stock, model = build_pair(name)
    assert torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))
    assert not counters.kernels and counters.fallbacks == {SMALL_ON_CPU: 3 * NEW}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_larger_prompt_is_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FEW_SCORES", {})
    stock, model = build_pair(name)
    assert torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))
    # Steps take no more with a mask, in fp32.
    assert counters.kernels == {"reference": 3} and counters.fallbacks == {SMALL_ON_CPU: 3 * (NEW - 1)}


def test_a_narrow_window_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FEW_SCORES", {})
    model = tiny("mistral_window")
    model.set_attn_implementation("fastattn")
    ids = {"input_ids": padded_batch(2, 40)["input_ids"].clamp(min=1)}
    tokens(model, ids, max_new_tokens=4)
    # The prompt is longer than the window; in the steps the cache holds what the window shows.
    assert counters.kernels == {"reference": 3} and counters.fallbacks == {ONE_LAUNCH: 9}


@pytest.mark.parametrize("output_attentions", [False, True])
def test_one_query_repeats_no_keys(output_attentions: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, count, 16, generator=generator) for heads, count in ((8, 1), (2, 9), (2, 9)))
    mask, sinks = torch.rand(2, 1, 1, 9, generator=generator) > 0.3, torch.randn(8, generator=generator)
    bias = torch.randn(2, 8, 1, 9, generator=generator)
    options = {"softcap": 2.0, "s_aux": sinks, "position_bias": bias, "scaling": 0.3, "output_attentions": output_attentions}
    with Operations() as operations:
        found = stock_attention(torch.nn.Module(), q, k, v, mask, **options)
    want = stock_attention(torch.nn.Module(), q, *(t.repeat_interleave(4, 1) for t in (k, v)), mask, **options)
    assert operations.counts["clone.default"] <= 1
    torch.testing.assert_close(found, want)


def tensors(cuda: bool = False, dtype: torch.dtype = torch.bfloat16, heads: int = 8, queries: int = 1, dim: int = 64) -> Any:
    shape = torch.Size((2, heads, queries, dim))
    device = torch.device("cuda" if cuda else "cpu")
    return SimpleNamespace(shape=shape, dtype=dtype, is_cuda=cuda, device=device, element_size=lambda: dtype.itemsize)


PADDED, HIDDEN = {"padded": True}, {"window": 39}
CAPPED = {"softcap": 50.0}


@pytest.mark.parametrize(
    ("why", "query", "layout", "kwargs"),
    [
        (ONE_LAUNCH, {}, {}, {}),
        (None, {"dtype": torch.float32}, {}, {}),
        (None, {"dim": 320}, {}, {}),
        (None, {}, PADDED, {}),
        (None, {}, {"kv_length": 50}, {}),
        (None, {}, HIDDEN, {}),
        (ONE_LAUNCH, {}, {"window": 40}, {}),
        (None, {"queries": 3}, {}, {}),
        (ONE_LAUNCH, {"queries": 40}, {}, {}),
        (None, {}, {}, CAPPED),
        (None, {}, {}, {"s_aux": 0}),
        (None, {"heads": 4}, {}, {}),
    ],
)
def test_the_rule_on_a_gpu(why: str | None, query: dict[str, Any], layout: dict[str, Any], kwargs: dict[str, Any]) -> None:
    assert rule(True, query, layout, kwargs) == why


@pytest.mark.parametrize(
    ("why", "query", "layout", "kwargs"),
    [
        (ONE_LAUNCH, {"dtype": torch.float32, "queries": 40}, {}, {}),
        # In all of these there are many scores.
        (SMALL_ON_CPU, {}, PADDED, {}),
        (None, {}, HIDDEN, {}),
        (None, {"queries": 40}, PADDED, {}),
        (SMALL_ON_CPU, {"dtype": torch.float32}, PADDED, CAPPED),
        (None, {}, PADDED, CAPPED),
        (None, {"queries": 40, "dtype": torch.float32}, {}, CAPPED),
        (None, {"heads": 4}, {}, {}),
    ],
)
def test_the_rule_on_a_cpu(
    why: str | None, query: dict[str, Any], layout: dict[str, Any], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_has_quick_products", lambda dtype: dtype.itemsize > 2)
    few = rule(False, query, layout, kwargs)
    assert few in (ONE_LAUNCH, SMALL_ON_CPU) or "heads" in query
    monkeypatch.setattr(choice, "FEW_SCORES", {})
    assert rule(False, query, layout, kwargs) == why


@pytest.mark.parametrize(("feature", "quick"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512_f", False)])
def test_products_of_16_bits(feature: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True, "amx_fp16": False}, raising=False)
    monkeypatch.setattr(choice, "_has_quick_products", choice._has_quick_products.__wrapped__)
    found = [choice._has_quick_products(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    assert found == [True, True, quick, False]
    # 2^16 scores: in Transformers' steps where these are quick.
    capped = rule(False, {"queries": 40, "heads": 8}, {"kv_length": 103, "filled": 103, **PADDED}, CAPPED)
    assert capped == (SMALL_ON_CPU if quick else None)


def rule(cuda: bool, query: dict[str, Any], layout: dict[str, Any], kwargs: dict[str, Any]) -> str | None:
    options = {"padded": False, "filled": 40, "kv_length": 40, "window": None, **layout}
    seen = CausalLayout.of_starts(torch.zeros(2, dtype=torch.int32), **options)
    module, key = SimpleNamespace(num_key_value_groups=4), tensors(cuda, heads=2, queries=options["kv_length"])
    return why_stock_is_enough(module, tensors(cuda, **query), key, seen, kwargs)


def test_without_a_mask_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 9, 16)
    with torch.no_grad(), Operations() as operations:
        attention_forward(torch.nn.Module(), q, k, k, None)
    assert sum("scaled_dot_product" in name for name in operations.counts) == 1
    assert sum(operations.counts.values()) <= 2, operations.counts


def test_it_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    interface._log.cache_clear()
    q: Tensor = torch.randn(2, 4, 1, 16)
    with caplog.at_level(logging.INFO, logger="hf_fastattn"), torch.no_grad():
        attention_forward(torch.nn.Module(), q, q, q, None)
    assert [record.levelname for record in caplog.records if record.name == "hf_fastattn"] == ["INFO"]
