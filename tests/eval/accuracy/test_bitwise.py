"""Attention of decode and of a forward, layer by layer: equal to the bit in batch-invariant mode, and told apart if not."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import hf_fastattn
from hf_fastattn.cache.batch import Batch
from hf_fastattn.eval.accuracy.bitwise import layers_apart
from hf_fastattn.eval.accuracy.exact_products import exact_products
from hf_fastattn.eval.accuracy.windows import WindowBatch
from tests.tools.models import VOCAB, tiny


def rows(lengths: list[int]) -> WindowBatch:
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    return WindowBatch((), ids, torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None])


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_equal_in_batch_invariant_mode(family: str) -> None:
    model = tiny(family)
    with hf_fastattn.patched(model, backend="triton", batch_invariant=True, page_size=16):
        apart = layers_apart(model, rows([35, 19, 40]), (-1, -2, -7))
        assert apart == [0.0] * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen3"])
def test_what_differs_is_seen(family: str) -> None:
    model = tiny(family)
    with hf_fastattn.patched(model, backend="reference"):
        apart = layers_apart(model, rows([35, 19, 40]))
        assert len(apart) == model.config.num_hidden_layers and 0 <= max(apart) < 1e-5
        assert hf_fastattn.report(model).pages_in_use == 0
        attend = Batch.attend

        def off_in_decode(self: Batch, q: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
            out = attend(self, q, *given, **options)
            return out + 1e-3 if self.is_decode else out

        with mock.patch.object(Batch, "attend", off_in_decode):
            assert min(layers_apart(model, rows([35, 19, 40]))) > 5e-4


def test_stock_has_no_layers_to_compare() -> None:
    with pytest.raises(ValueError, match="no layer of the model attended over pages"):
        layers_apart(tiny("llama"), rows([20, 18]))


def test_products_round_once_whatever_their_shape() -> None:
    layer = tiny("llama").bfloat16().model.layers[0].mlp.gate_proj
    x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        with exact_products(layer):
            whole, alone = layer(x), torch.cat([layer(row[None]) for row in x])
        assert torch.equal(whole, alone) and torch.equal(layer(x), plain)
        assert torch.equal(whole, (x.double() @ layer.weight.double().T).bfloat16())
