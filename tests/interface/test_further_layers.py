"""What the first layer of a forward decides for those behind the same mask, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_fastattn import interface
from hf_fastattn.dense import choice
from hf_fastattn.dense.choice import ONE_LAUNCH
from hf_fastattn.dense.stock_attention import OneLaunch, stock_attention
from hf_fastattn.interface import attention_forward, counters
from tests.interface.operations import Operations


class Attention(torch.nn.Module):
    """As much of a model's attention as its function looks at."""

    def __init__(self, groups: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal


def mask_of(queries: int, keys: int, given: Tensor | None = None) -> Tensor | None:
    return interface.attention_mask(2, queries, keys, q_offset=keys - queries, attention_mask=given)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"scaling": 0.3, "dropout": 0.0, "is_causal": True}])
def test_further_layers_make_sdpas_call(queries: int, groups: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, count, 16, generator=generator)
        for heads, count in ((4, queries), (4 // groups, 9), (4 // groups, 9))
    )
    module, mask, calls = Attention(groups), mask_of(queries, 9), list[dict[str, int]]()
    with torch.no_grad():
        want, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        for _ in range(3):
            with Operations() as operations:
                found, _ = attention_forward(module, q, k, v, mask, **options)
            assert torch.equal(found, want) and found.is_contiguous()
            calls.append(dict(operations.counts))
    assert calls[0] == calls[1] == calls[2] and counters.fallbacks == {ONE_LAUNCH: 3}


def test_a_layer_that_asks_for_more_is_not_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 1, 16, generator=generator), torch.randn(2, 2, 9, 16, generator=generator)
    module, mask = Attention(), mask_of(1, 9)
    with torch.no_grad():
        plain, _ = attention_forward(module, q, k, k, mask)
        for more in ({"softcap": 0.5}, {"s_aux": torch.full((4,), 3.0)}, {"position_bias": torch.randn(1, 4, 1, 9)}):
            found, _ = attention_forward(module, q, k, k, mask, **more)
            want, _ = stock_attention(module, q, k, k, None, **more)
            torch.testing.assert_close(found, want)
            assert not torch.allclose(found, plain, atol=1e-3)
        # Keys that the mask does not fit: counted with another reason.
        attention_forward(module, q, k[:, :, :7], k[:, :, :7], mask)
        assert counters.fallbacks[ONE_LAUNCH] == 1 and sum(counters.fallbacks.values()) + sum(counters.kernels.values()) == 5


@pytest.mark.parametrize("more", [{"position_bias": torch.full((1, 4, 1, 9), 0.1)}, {"output_attentions": True}])
def test_a_layer_with_more_begins_nothing(more: dict[str, Any]) -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    assert OneLaunch.of(Attention(), q, k, k, {}) is not None and OneLaunch.of(Attention(), q, k, k, more) is None
    assert OneLaunch.of(Attention(), torch.randn(2, 4, 3, 16), k, k, {}) is None


def test_what_hides_both_ways_is_hidden_in_further_layers() -> None:
    """A layer that is not causal among causal ones sees all keys, as under sdpa without a mask."""
    q = torch.randn(2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    mask = mask_of(9, 9)
    with torch.no_grad():
        attention_forward(Attention(1), q, q, q, mask)
        for module, options in ((Attention(1, False), {}), (Attention(1), {"is_causal": False})):
            want, _ = sdpa_attention_forward(module, q, q, q, None, **options)
            assert torch.equal(attention_forward(module, q, q, q, mask, **options)[0], want)


def test_a_choice_of_ours_is_made_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(choice, "FEW_SCORES", {})
    monkeypatch.setattr(interface, "why_stock_is_enough", lambda *given: asked.append(1))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 16, generator=generator), torch.randn(2, 2, 9, 16, generator=generator)
    mask = mask_of(9, 9)
    with torch.no_grad():
        first, _ = attention_forward(Attention(), q, k, k, mask, softcap=0.5)
        second, _ = attention_forward(Attention(), q, k, k, mask, softcap=0.5)
        assert torch.equal(first, second) and len(asked) == 1
        other, _ = attention_forward(Attention(), q, k, k, mask, softcap=5.0)
        assert len(asked) == 2 and not torch.allclose(first, other)
        assert counters.kernels == {"reference": 3} and not counters.fallbacks
        attention_forward(Attention(), q, k, k, mask, softcap=0.5, dropout=0.1)
    assert counters.fallbacks == {"dropout": 1}
    q.requires_grad_()
    attention_forward(Attention(), q, k, k, mask, softcap=0.5)
    assert counters.fallbacks == {"dropout": 1, "gradients are needed": 1}


def test_a_mask_without_padding_launches_nothing_of_its_own() -> None:
    mask_of(1, 9)
    with Operations() as operations:
        mask = mask_of(1, 9)
    assert isinstance(mask, Tensor) and mask.shape == (2, 9) and bool(mask.all())
    assert set(operations.counts) <= {"expand.default"}, operations.counts
