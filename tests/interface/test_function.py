"""The attention function by itself, against its definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn.dense import dense_attention
from hf_fastattn.dense.causal_layout import CausalLayout
from hf_fastattn.interface import attention_forward, counters
from tests.interface.dense_cases import OPTIONS, Case, check_repeated, make_case, oracle
from tests.interface.tiny import assert_ours


def check_case(backend: str, sinks: bool = False, softcap: float | None = None, other: bool = False, **shape: Any) -> None:
    case, window = make_case(**shape), shape.get("window")
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1)) if sinks else None
    value = case.v.transpose(1, 2).contiguous().transpose(1, 2) if other else case.v
    with torch.no_grad():
        out, weights = attention_forward(
            torch.nn.Module(), case.q, case.k, value, case.mask, scaling=0.3, softcap=softcap, s_aux=logits
        )
    assert weights is None
    assert_ours(1, backend)
    torch.testing.assert_close(out.double(), oracle(case, 0.3, window, softcap, logits), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_in_place(name: str) -> None:
    check_case("reference", **OPTIONS[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_as_pages(name: str) -> None:
    check_case("triton", **OPTIONS[name])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["one query", "one query, window, sinks", "plain", "sinks", "all queries, long", "heads before rows"]
)
def test_layers_that_repeat_a_launch(name: str) -> None:
    check_repeated(name, "cpu")


def test_keys_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pages = dense_attention._pages

    def recorded(k: Tensor, *args: Any) -> Tensor:
        read.append(k.data_ptr())
        return pages(k, *args)

    monkeypatch.setattr(dense_attention, "_pages", recorded)
    for layout in ("BGLD", "BLGD"):
        case = make_case(layout=layout)
        read.clear()
        attention_forward(torch.nn.Module(), case.q, case.k, case.v, case.mask)
        assert read == [case.k.data_ptr(), case.v.data_ptr()]


@pytest.mark.parametrize("queries", [1, 100])
def test_one_binary_serves_all_lengths(queries: int) -> None:
    pytest.importorskip("triton")
    from tests.tools.fake_driver import counting_driver
    from tests.tools.targets import TARGETS

    q = torch.zeros(2, 8, queries, 64, dtype=torch.bfloat16)
    with counting_driver(TARGETS["sm_90"]) as fake:
        for length in (100, 101, 112, 1024):
            k = torch.zeros(2, 2, length, 64, dtype=torch.bfloat16)
            layout = CausalLayout.unpadded(2, length, q.device)
            dense_attention.dense_attention(q, k, k.clone(), layout, backend="triton", scale=0.1)
        assert len(fake.compiled()) == 1


def module_with(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("window", [None, 6])
def test_a_copy_of_the_mask(window: int | None) -> None:
    """As a split model hands out: the layout is lost, and found again."""
    case = make_case(window=window)
    want, _ = attention_forward(torch.nn.Module(), case.q, case.k, case.v, case.mask)
    for module, kwargs in ((module_with(sliding_window=window), {}), (module_with(), {"sliding_window": window})):
        ours, _ = attention_forward(module, case.q, case.k, case.v, case.mask.clone(), **kwargs)
        assert torch.equal(ours, want)
    assert_ours(3)


@pytest.mark.parametrize(
    "reason, change",
    [
        ("is_causal=False", lambda case: {"is_causal": False}),
        ("dropout", lambda case: {"dropout": 0.1}),
        ("scaling or softcap is not a positive number", lambda case: {"scaling": -0.25}),
        ("gradients are needed", lambda case: {"s_aux": torch.zeros(4, requires_grad=True)}),
        ("a padding mask that is not plain left padding of these queries and keys", lambda case: {"rows": 2}),
        ("head dims of keys and values differ", lambda case: {"value": case.v[..., :8]}),
    ],
)
def test_reasons(reason: str, change: Callable[[Case], dict[str, Any]]) -> None:
    case = make_case()
    kwargs = change(case)
    rows = kwargs.pop("rows", 3)
    q, k, v = (t.nan_to_num()[:rows] for t in (case.q, case.k, kwargs.pop("value", case.v)))
    mask = case.mask if rows == 3 else case.mask[:2] & (torch.arange(40) != 20)
    with torch.enable_grad():
        out, _ = attention_forward(module_with(num_key_value_groups=2), q, k, v, mask, **kwargs)
    assert out.shape == (rows, 5, 4, v.shape[-1]) and out.isfinite().all()
    assert not counters.kernels and counters.fallbacks == {reason: 1}
