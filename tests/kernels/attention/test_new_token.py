"""Parts of a row whose decode appends, and what it refuses; what all kernels of one token do is in `test_one_token.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.new_token import NewToken
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention import one_token
from tests.kernels.cases import make_batch

BF16 = torch.bfloat16
NORMS = ("q_norm", "k_norm", "eps", "unit_offset")


def attend(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, k_pages: Any, v_pages: Any, slots: Any, *batch: Any, **options: Any
) -> Any:
    new = NewToken(k, v, cos, sin, slots, **{name: options.pop(name) for name in NORMS if name in options}, settled=True)
    return paged_decode(q, k_pages, v_pages, *batch, new=new, **options)[0]


def check(*pasts: int, **options: Any) -> torch.Tensor:
    return one_token.check(attend, *pasts, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_parts(processors):
    """One program of all keys, and several: each time twice, since counters have to be zero again."""
    workspace = Workspace(torch.device("cpu"))
    for past in (129, 500):
        shape = {"page": 16, "ratio": 2, "groups": 1, "dim": 32, "dtype": BF16, "processors": processors}
        first = check(past, workspace=workspace, **shape)
        assert torch.equal(first, check(past, workspace=workspace, **shape))


@pytest.mark.gpu
@pytest.mark.parametrize("past", [-1, 0, 1023, 4000, 30_000])
@pytest.mark.parametrize(("ratio", "dim"), [(4, 128), (2, 128), (4, 64), (7, 80), (8, 256)])
def test_on_a_gpu(past, ratio, dim):
    check(past, page=16, ratio=ratio, dim=dim, dtype=BF16, groups=8, norm=dim == 128, device="cuda")


def test_what_does_not_fit():
    def refused(match: str, counts: list[int], rotary: int = 32, kv_heads: int = 1, one: bool = True, **options: Any):
        batch = make_batch([1] * len(counts), counts, dim=32, dtype=BF16, page=16, ratio=2, groups=2)
        k, cos = torch.zeros(1, 2 * kv_heads, 32, dtype=BF16), torch.zeros(1, rotary, dtype=BF16)
        new = NewToken(k, k, cos, cos, torch.zeros(1, dtype=torch.int32), None if one else cos[0])
        given = (batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens)
        with pytest.raises(ValueError, match=match):
            paged_decode(*given, scale=1.0, new=new, **options)

    refused("a single row of 16 bits", [3, 20])
    refused("take rope_append", [20], batch_invariant=True)
    refused("without a variant or softcap", [20], softcap=30.0)
    refused(r"must be \[1, G, D\] = \(1, 2, 32\)", [20], kv_heads=2)
    refused(r"cos \(1, 64\)", [20], rotary=64)
    refused("expected both or none", [20], one=False)
