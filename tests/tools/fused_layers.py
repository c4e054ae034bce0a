"""Tiny models with fused layers, and the checks that their tests make."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.kernels.cases import assert_close
from tests.tools.models import QUERY_SCALE, tiny

LAYER_COUNT = 2
# At the usual 0.3 errors of the first layer grow so much that any order of summation may be lucky.
SMALL: dict[str, Any] = {"num_hidden_layers": LAYER_COUNT, "initializer_range": 0.1}
MIXED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2_window", MIXED),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral_window", {"sliding_window": 6}),
    "ministral": ("ministral", MIXED),
    "cwm": ("cwm", MIXED),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "ministral3": ("ministral3", {"rope_parameters": {**QUERY_SCALE, "original_max_position_embeddings": 4}}),
}
KERNELS = ("matvec", "gate_up_silu", "rms_norm", "add_rms_norm", "silu_and_mul")


def build(name: str) -> Any:
    family, over = FUSED[name]
    return tiny(family, **{**SMALL, **over})


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of our operations is called from now on."""
    from hf_fastattn.patches.fused import products

    counts: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return operation(*args, **kwargs)

        return run

    for name in KERNELS:
        monkeypatch.setattr(products, name, counted(name, getattr(products, name)))
    return counts


def expected(tokens: int) -> dict[str, int]:
    """Launches of a forward of plain layers."""
    if tokens > 16:
        return {"rms_norm": 1, "add_rms_norm": 2 * LAYER_COUNT, "silu_and_mul": LAYER_COUNT}
    return {"matvec": 3 * LAYER_COUNT, "gate_up_silu": LAYER_COUNT, "rms_norm": 1 + 2 * LAYER_COUNT}


def steps(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], cache: Any, **kwargs: Any) -> list[Tensor]:
    """Logits of `ids` given in parts that end at `cuts`."""
    outs, begin = [], 0
    with torch.no_grad():
        for end in cuts:
            shown = None if mask is None else mask[:, :end]
            outs.append(model(ids[:, begin:end], attention_mask=shown, **{CACHE: cache}, use_cache=True, **kwargs).logits)
            begin = end
    return outs


def assert_logits(name: str, stock: Any, ours: Tensor, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> None:
    """Within the criterion where there are tokens; stock's error is that of the worst of three orders of summation."""
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(ids, attention_mask=mask).logits[seen]
        plains = [stock(ids, attention_mask=mask).logits[seen]]
        stock.set_attn_implementation("eager")
        plains.append(stock(ids, attention_mask=mask).logits[seen])
        plains.append(torch.cat(steps(stock, ids, mask, cuts, DynamicCache(config=stock.config)), 1)[seen])
    worst = max(plains, key=lambda plain: float((plain.double() - exact).abs().max()))
    assert_close(name, ours[seen], worst, exact)


def assert_fused(name: str, stock: Any, model: Any, launched: Counter[str]) -> None:
    """A prompt and a step of the patched model launch what fused layers do (`count_launches`), within the criterion."""
    ids = torch.randint(1, 128, (1, 4), generator=torch.Generator().manual_seed(2))
    outs = []
    cache = hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 3), (3, 4)):
        launched.clear()
        outs += steps(model, ids[:, begin:end], None, [end - begin], cache)
        assert dict(launched) == expected(end - begin)
    assert_logits(name, stock, torch.cat(outs, 1), ids, None, [3, 4])
