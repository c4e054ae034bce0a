"""Thirty wrong variants: each an error that says what and where, raised by `patch`, and the model works afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn import Variant
from tests.tools.models import assert_fast, single, tiny

TABLE = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
SEEN: list[Any] = []


def branch(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    if q_idx > 3:
        return score
    return -score


def loops_while(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    while kv_idx > 0:
        kv_idx = kv_idx - 1
    return score


def writes(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    score += 1
    return score


def writes_outside(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    TABLE[0, 0] = 1.0
    return score


def writes_a_result(q, h, q_idx):  # type: ignore[no-untyped-def]
    doubled = q * 2
    doubled[0] = 0.0
    return doubled


def calls_numpy(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return score + float(h.numpy())


Make = Callable[[], Any]
# Without an import of Triton: what tracing and looking at the fields find.
WRONG: dict[str, tuple[Make, str]] = {
    "a branch": (lambda: Variant(score_mod=branch), "if q_idx > 3.*torch.where"),
    "a loop over a value": (lambda: Variant(score_mod=loops_while), "while kv_idx > 0.*torch.where"),
    "a range of keys": (
        lambda: Variant(score_mod=lambda s, b, h, q, k: sum(s for _ in range(k))),
        "depends on the value",
    ),
    "item": (lambda: Variant(score_mod=lambda s, b, h, q, k: s * h.item()), "h.item.*torch.where"),
    "int()": (lambda: Variant(mask_mod=lambda b, h, q, k: q > int(k)), "depends on the value"),
    "numpy": (lambda: Variant(score_mod=calls_numpy), r"h\.numpy.*out of PyTorch"),
    "a list": (lambda: Variant(score_mod=lambda s, b, h, q, k: s * h.tolist()), "tolist.*out of PyTorch"),
    "a mask as an index": (lambda: Variant(query_transform=lambda q, h, i: q[q > 0]), "fails|depends|shape"),
    "in place": (lambda: Variant(score_mod=writes), r"score \+= 1.*x = x \+ y"),
    "in place, outside": (lambda: Variant(score_mod=writes_outside), "TABLE.*in place"),
    "in place, a result": (lambda: Variant(query_transform=writes_a_result), r"doubled\[0\].*in place"),
    "random": (lambda: Variant(score_mod=lambda s, b, h, q, k: s + torch.rand(())), "torch.rand"),
    "dropout": (
        lambda: Variant(output_transform=lambda o, h, i: torch.nn.functional.dropout(o, 0.5)),
        "dropout",
    ),
    "a vector from a score": (lambda: Variant(score_mod=lambda s, b, h, q, k: TABLE[h]), r"shape \(40,\).*scalar"),
    "a scalar from a transform": (lambda: Variant(query_transform=lambda q, h, i: q.sum()), r"shape \(\).*vector \[16\]"),
    "half a vector": (lambda: Variant(key_transform=lambda k, h, i: k[:8]), r"shape \(8,\)"),
    "a score from a mask": (lambda: Variant(mask_mod=lambda b, h, q, k: q - k), "torch.int32.*bool"),
    "a mask from a score": (lambda: Variant(score_mod=lambda s, b, h, q, k: q > k), "torch.bool.*number"),
    "nothing": (lambda: Variant(score_mod=lambda s, b, h, q, k: None), "returns None"),
    "a number": (lambda: Variant(mask_mod=lambda b, h, q, k: True), "returns True"),
    "a pair": (lambda: Variant(score_mod=lambda s, b, h, q, k: (s, s)), "returns"),
    "too many indices": (lambda: Variant(score_mod=lambda s, b, h, q, k: s + TABLE[h, q, k]), "IndexError.*too many"),
    "shapes that do not fit": (
        lambda: Variant(query_transform=lambda q, h, i: q * TABLE[0]),
        "16.*40|40.*16|size of tensor",
    ),
    "an unknown name": (lambda: Variant(score_mod=lambda s, b, h, q, k: s + undefined), "NameError.*undefined"),  # type: ignore[name-defined]  # noqa: F821
    "an error of its own": (lambda: Variant(score_mod=lambda s, b, h, q, k: 1 // 0), "ZeroDivisionError"),
    "too few arguments": (lambda: Variant(score_mod=lambda s, q, k: s), r"score, b, h, q_idx, kv_idx"),
    "a parameter that nobody reads": (
        lambda: Variant(score_mod=lambda s, b, h, q, k: s, parameters={"table": TABLE}),
        "table.*read by none",
    ),
    "sinks for other heads": (lambda: Variant(sinks=torch.zeros(7)), "7 entries.*4 query heads"),
    "slopes for other heads": (lambda: Variant(alibi=torch.zeros(2)), "2 entries.*4 query heads"),
    "a window of nothing": (lambda: Variant(window=0), "window=0"),
    "no function": (lambda: Variant(mask_mod="causal"), "mask_mod must be a function"),  # type: ignore[arg-type]
    "no variant": (lambda: "alibi", "variant must be a hf_fastattn.Variant"),
    "layers of something else": (lambda: lambda index: index, r"variant\(0\) gives 0"),
}
# What PyTorch runs and the kernels do not.
UNTRANSLATED: dict[str, tuple[Make, str]] = {
    "sort": (lambda: Variant(query_transform=lambda q, h, i: torch.sort(q).values), "torch.sort.*no translation"),
    "largest": (lambda: Variant(query_transform=lambda q, h, i: q.topk(16).values), "topk.*no translation"),
    "complex": (lambda: Variant(score_mod=lambda s, b, h, q, k: torch.complex(s, s).real), "no translation|fails"),
}


def check(make: Make, words: str) -> None:
    model = tiny("llama", num_hidden_layers=1)
    before, batch = dict(vars(model)), single(20)
    with pytest.raises((ValueError, TypeError)) as error:
        hf_fastattn.patch(model, variant=make())
    assert re.search(words, str(error.value), re.DOTALL), str(error.value)
    assert dict(vars(model)) == before and not hf_fastattn.report(model).patched
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert_works(model, batch)


def assert_works(model: Any, batch: dict[str, Tensor]) -> None:
    stock = tiny("llama", num_hidden_layers=1)
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    hf_fastattn.patch(model)
    assert torch.equal(model.generate(**batch, **asked), stock.generate(**batch, **asked))
    assert_fast(model)


@pytest.mark.parametrize("name", WRONG)
def test_raised_by_patch(name: str) -> None:
    check(*WRONG[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*WRONG, *UNTRANSLATED])
def test_raised_by_patch_before_the_kernels(name: str) -> None:
    check(*{**WRONG, **UNTRANSLATED}[name])


def test_there_are_thirty() -> None:
    assert len(WRONG) >= 30


def test_a_tensor_elsewhere() -> None:
    model, far = tiny("llama", num_hidden_layers=1), torch.zeros(40, device="meta")
    with pytest.raises(hf_fastattn.VariantError, match=r"on meta, but attention runs on cpu; move it there"):
        hf_fastattn.patch(model, variant=Variant(score_mod=lambda s, b, h, q, k: s + far[k]))
    assert_works(model, single(20))
