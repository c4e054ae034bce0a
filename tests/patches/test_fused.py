"""Fused layers in Triton's interpreter: results as stock's within the criterion, and the kernels really run."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import hf_fastattn
from hf_fastattn.kernels.layer.configs import MOST_TOKENS
from hf_fastattn.patches.fused.forward import fused_logits, fused_reason
from hf_fastattn.transformers_version import CACHE
from tests.kernels.cases import assert_close
from tests.tools.fused_layers import FUSED, LAYER_COUNT, assert_logits, build, count_launches, expected, steps
from tests.tools.models import VOCAB, padded_batch, tiny


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUSED)
def test_logits(name: str, launched: Counter[str]) -> None:
    stock, model = build(name), hf_fastattn.patch(build(name))
    assert fused_reason(model.model) is None
    batch = padded_batch(3, 12)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    biased = LAYER_COUNT if "mlp_bias" in FUSED[name][1] else 0
    # Prompts, one token each, two each.
    for (begin, end), tokens in (((0, 9), int(mask[:, :9].sum())), ((9, 10), 3), ((10, 12), 6)):
        launched.clear()
        with torch.no_grad():
            part = model(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True)
        outs.append(part.logits)
        want = expected(tokens)
        if biased and tokens <= 16:
            want = {**want, "matvec": 4 * LAYER_COUNT, "silu_and_mul": LAYER_COUNT}
            del want["gate_up_silu"]
        assert dict(launched) == want, tokens
    assert_logits(name, stock, torch.cat(outs, 1), ids, mask, [9, 10, 12])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_of_one_row(name: str, launched: Counter[str]) -> None:
    stock, model = build(name), hf_fastattn.patch(build(name))
    ids = torch.randint(1, VOCAB, (1, 8), generator=torch.Generator().manual_seed(2))
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 1), (1, 7), (7, 8)):
        launched.clear()
        with torch.no_grad():
            outs.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
        assert dict(launched) == expected(end - begin)
    assert_logits(name, stock, torch.cat(outs, 1), ids, None, [1, 7, 8])


@pytest.mark.interpreter
def test_logits_of_many_tokens(launched: Counter[str]) -> None:
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    tokens = MOST_TOKENS + 6
    ids = torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(3))
    outs = steps(model, ids, None, [tokens], hf_fastattn.PagedCache(model.config))
    assert dict(launched) == expected(tokens)
    assert_logits("llama", stock, outs[0], ids, None, [tokens])


@pytest.mark.interpreter
def test_tokens_of_generate(launched: Counter[str]) -> None:
    stock, model = build("qwen3"), hf_fastattn.patch(build("qwen3"))
    batch = padded_batch(2, 11)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), stock.generate(**batch, **options))
    assert launched["gate_up_silu"] == 3 * LAYER_COUNT and not hf_fastattn.report(model).last_call.fallbacks
    with torch.no_grad():
        launched.clear()
        hf_fastattn.unpatch(model)
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
        assert torch.equal(model.generate(**batch, **options), stock.generate(**batch, **options))
    assert not launched


@pytest.mark.interpreter
def test_reasons() -> None:
    assert "not known" in (fused_reason(hf_fastattn.patch(tiny("granite")).model) or "")
    asked = hf_fastattn.patch(build("llama"), backend="reference")
    assert fused_reason(asked.model) == "asked for"


def test_a_cpu_runs_the_original() -> None:
    model = hf_fastattn.patch(build("llama"))
    assert "CUDA" in (fused_reason(model.model) or "")


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_fused_logits(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastattn.patches.fused import products

    calls: list[int] = []
    product = products.matvec
    monkeypatch.setattr(products, "matvec", lambda *args, **kwargs: calls.append(1) or product(*args, **kwargs))
    torch.manual_seed(0)
    head, hidden = nn.Linear(64, 130, bias=bias), torch.randn(tokens, 64)
    with torch.no_grad():
        got = fused_logits(head, hidden)
        assert len(calls) == (tokens <= 16)
        assert_close("logits", got, head(hidden), copy.deepcopy(head).double()(hidden.double()))
        head.register_forward_hook(lambda module, given, out: 1.5 * out)
        assert torch.equal(fused_logits(head, hidden), head(hidden)) and len(calls) == (tokens <= 16)
    assert fused_logits(head, hidden).requires_grad
