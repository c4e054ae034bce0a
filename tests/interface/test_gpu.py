"""The same on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_fastattn.dense import dense_attention
from hf_fastattn.dense.causal_layout import CausalLayout, layout_of
from hf_fastattn.interface import counters
from tests.interface.dense_cases import OPTIONS, check_repeated, make_case, oracle
from tests.interface.tiny import CALLS, MODELS, NEW, assert_ours, build_pair, tokens
from tests.tools.models import padded_batch


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock_on_a_gpu(name: str, call: str) -> None:
    stock, model = (m.to("cuda") for m in build_pair(name))
    batch = {key: value.to("cuda") for key, value in padded_batch().items()}
    assert torch.equal(tokens(model, batch, **CALLS[call]), tokens(stock, batch, **CALLS[call]))
    assert_ours(3 * NEW, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits(name: str, dtype: torch.dtype) -> None:
    # At a usual weight scale: at 0.3 the logits of these models overflow what 16 bits can tell apart.
    # Every expert for every token: which ones are chosen may hang on a rounding error.
    over = {"num_experts_per_tok": 4} if name == "gpt_oss" else {}
    stock, model = (m.to("cuda") for m in build_pair(name, initializer_range=0.05, **over))
    batch = {key: value.to("cuda") for key, value in padded_batch(3, 100).items()}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = stock(**batch).logits[real].double()
        plain = copy.deepcopy(stock).to(dtype)(**batch).logits[real].double()
        ours = model.to(dtype)(**batch).logits[real].double()
    assert_ours(3, "triton")
    assert (ours - want).abs().max() <= 2 * (plain - want).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_as_pages_on_a_gpu(name: str) -> None:
    options = dict(OPTIONS[name])
    sinks, softcap, other = options.pop("sinks", False), options.pop("softcap", None), options.pop("other", False)
    case = make_case(**options)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1)) if sinks else None
    want = oracle(case, 0.3, options.get("window"), softcap, logits)
    layout = layout_of(case.mask)
    assert layout is not None
    layout = CausalLayout.of_starts(layout.starts.cuda(), True, layout.filled, layout.kv_length, layout.window)
    value = case.v.transpose(1, 2).contiguous().transpose(1, 2) if other else case.v
    out = dense_attention.dense_attention(
        case.q.cuda(), case.k.cuda(), value.cuda(), layout, backend="triton", scale=0.3, softcap=softcap,
        sinks=None if logits is None else logits.cuda(),
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["one query", "one query, window, sinks", "plain", "all queries, long"])
def test_layers_that_repeat_a_launch_on_a_gpu(name: str, dtype: torch.dtype, rows: int) -> None:
    check_repeated(name, "cuda", dtype, rows)


@pytest.mark.gpu
def test_heads_that_the_kernels_refuse() -> None:
    stock, model = (m.to("cuda") for m in build_pair("llama", head_dim=12))
    batch = {key: value.to("cuda") for key, value in padded_batch().items()}
    assert torch.equal(tokens(model, batch), tokens(stock, batch))
    assert not counters.kernels and "head dim 12" in next(iter(counters.fallbacks))
