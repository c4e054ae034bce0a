"""Decode of a single row against dense attention: even parts of every kv head, merged by the last program."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.attention import decode, decode_row
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.page_formats import KV_DTYPES
from tests.kernels.attention.test_decode import BF16, FP16, check
from tests.kernels.cases import in_eight_bits, make_batch
from tests.kernels.sweep import SHAPES, batches, length, shapes
from tests.tools.combinations import in_turn


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_turn([(1, 64, 16), (2, 16, 32), (4, 128, 16), (5, 80, 16), (7, 96, 64), (8, 64, 16), (16, 256, 32)], [BF16, FP16]),
)
def test_shapes(shape, dtype):
    ratio, dim, page = shape
    for keys in (-1, 0, 15, 63, 200):
        check(make_batch([1], [keys], ratio=ratio, dim=dim, page=page, dtype=dtype, groups=2, scattered=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window_and_softcap(window, softcap):
    for keys in (3, 64, 210):
        options = {"page": 16, "ratio": 4, "dim": 32, "window": window, "scattered": True, "dtype": BF16}
        check(make_batch([1], [keys], **options), window=window, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
@pytest.mark.parametrize("parts", [1, 2, 3, 32])
def test_any_number_of_parts(parts, kv_dtype, monkeypatch):
    monkeypatch.setattr(decode_row, "MOST_PARTS", parts)
    monkeypatch.setattr(decode_row, "MERGE_ELEMENTS", 512)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = 64
    batch = make_batch([1], [700], page=16, ratio=4, dim=64, groups=1, dtype=BF16)
    batch = batch if kv_dtype is None else in_eight_bits(batch, kv_dtype)
    first = check(batch, workspace=workspace)
    for before, after in zip(first, check(batch, workspace=workspace), strict=True):
        assert torch.equal(before, after)
    assert not workspace.split_kv(1, 4, 64)[2].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_keys_of_eight_bits(kv_dtype, monkeypatch):
    """Lengths that end with a tile and within one, windows that begin in one, and rows without a key; in this kernel."""
    launched = []
    monkeypatch.setattr(decode, "decode_row", lambda *a, **k: launched.append(a) or decode_row.decode_row(*a, **k))
    for keys in (-1, 0, 127, 128, 300):
        for window, softcap in ((None, None), (100, None), (None, 5.0)):
            batch = make_batch([1], [keys], page=16, ratio=4, dim=128, groups=2, dtype=BF16, window=window, scattered=True)
            check(in_eight_bits(batch, kv_dtype), window=window, softcap=softcap)
    assert len(launched) == 15
    batch = in_eight_bits(make_batch([1], [64], page=16, ratio=4, dim=128, groups=2, dtype=torch.float32), kv_dtype)
    check(batch)
    assert len(launched) == 15


@pytest.mark.interpreter
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("many", [0, 10**6])
def test_rows_share_the_parts(kv_dtype, many, monkeypatch):
    """By their lengths, in the kernel with two loops over keys and with one."""
    monkeypatch.setattr(decode_row, "MANY_KEYS", many)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = 12
    for keys in ([600, 40, 290], [-1, 500], [10, 700, 0, 130]):
        batch = make_batch([1] * len(keys), keys, page=16, ratio=4, dim=64, groups=2, dtype=BF16, scattered=True)
        check(in_eight_bits(batch, kv_dtype), workspace=workspace)
        assert not workspace.split_kv(1, 4, 64)[2].any()


@pytest.mark.gpu
@shapes(tuple(shape for shape in SHAPES if shape.dtype != torch.float32))
def test_sweep(shape):
    for random, options, features in batches(shape, 8):
        check(make_batch([1], [length(random, shape.page) - 1], **options), **features)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, "fp8", "int8"])
def test_one_graph_follows_the_length(kv_dtype):
    batch = make_batch([1], [9000], page=16, ratio=4, dim=128, groups=8, dtype=BF16, device="cuda", scattered=True)
    batch = batch if kv_dtype is None else in_eight_bits(batch, kv_dtype)
    workspace, lengths, page_table = Workspace(torch.device("cuda")), batch.seq_lens.clone(), batch.page_table

    def run():
        return decode_row.decode_row(
            batch.q, batch.k_pages, batch.v_pages, page_table, lengths,
            scale=batch.scale, window=None, softcap=None, workspace=workspace,
        )[:2]  # fmt: skip

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for keys in (9001, 17, 5000, 1, 0, 9001):
        lengths.fill_(keys)
        graph.replay()
        want = run()
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
