"""Decode of a single row against dense attention: even parts of every kv head, merged by the last program."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.attention import decode_row
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention.test_decode import BF16, FP16, check
from tests.kernels.cases import make_batch
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
@pytest.mark.parametrize("parts", [1, 2, 3, 32])
def test_any_number_of_parts(parts, monkeypatch):
    monkeypatch.setattr(decode_row, "MOST_PARTS", parts)
    monkeypatch.setattr(decode_row, "MERGE_ELEMENTS", 512)
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = 64
    batch = make_batch([1], [700], page=16, ratio=4, dim=32, groups=1, dtype=BF16)
    first = check(batch, workspace=workspace)
    for before, after in zip(first, check(batch, workspace=workspace), strict=True):
        assert torch.equal(before, after)
    assert not workspace.split_kv(1, 4, 32)[2].any()


@pytest.mark.gpu
@shapes(tuple(shape for shape in SHAPES if shape.dtype != torch.float32))
def test_sweep(shape):
    for random, options, features in batches(shape, 8):
        check(make_batch([1], [length(random, shape.page) - 1], **options), **features)


@pytest.mark.gpu
def test_one_graph_follows_the_length():
    batch = make_batch([1], [9000], page=16, ratio=4, dim=128, groups=8, dtype=BF16, device="cuda", scattered=True)
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
