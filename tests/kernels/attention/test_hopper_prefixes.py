"""The Gluon kernel over shared prefixes on Hopper, and on the CPU the work items that it is given."""

from __future__ import annotations

import dataclasses
import sys
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.attention import configs, shared_prefix
from hf_fastattn.kernels.attention.prefix_items import prefix_items
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention.test_shared_prefix import NESTED, Group, check, check_nested, make_shared, random_groups
from tests.kernels.cases import assert_attention

BF16, FP16 = torch.bfloat16, torch.float16
MODULE = "hf_fastattn.kernels.attention.hopper_prefixes"
ROWS, KEYS = 32, 32


def plain_prefixes(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor, group_starts: Tensor,
    prefix_lens: Tensor, partial: Tensor, partial_sum: Tensor, *, scale: float, programs: int, whole_base: int,
    work_lists: WorkLists,
) -> Tensor:  # fmt: skip
    """`hopper_prefixes` in PyTorch, by the same work items. No item is done twice, or by two programs."""
    heads, kv_heads, page = q.shape[1], k_pages.shape[2], k_pages.shape[1]
    ratio, done = heads // kv_heads, set()
    if "items" not in work_lists:
        work_lists["items"] = prefix_items(
            seq_lens, group_starts, prefix_lens, heads=(heads, kv_heads), programs=programs, block_m=ROWS,
            block_n=KEYS, whole_base=whole_base,
        )  # fmt: skip
    items, ranges, places = work_lists["items"]
    for first, past in ranges.tolist():
        for item in range(first, past):
            assert item not in done
            done.add(item)
            reader, token, new, head, begin, length, at, stride = items[item].tolist()
            assert 1 <= new <= ROWS // ratio and length > 0
            key = torch.arange(begin, begin + length)
            held = page_table[reader][key // page].long()
            k, v = (x[held, key % page, head].double() for x in (k_pages, v_pages))
            for row in range(new):
                scores = (
                    q[token + row, head * ratio : (head + 1) * ratio].double() @ k.T * scale / torch.log(torch.tensor(2.0))
                )
                most = scores.amax(-1)
                weights = torch.exp2(scores - most[:, None])
                to = at + row * stride + torch.arange(ratio)
                partial[to, : q.shape[2]] = (weights @ v).float()
                partial_sum[to] = torch.stack((most, weights.sum(-1)), -1).float()
    return places


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(hopper_prefixes=plain_prefixes, why_not_prefixes=lambda *given: None)
    monkeypatch.setitem(sys.modules, MODULE, module)  # type: ignore[arg-type]
    monkeypatch.setattr(shared_prefix, "GLUON_ROWS", ROWS)
    always(monkeypatch)


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "GLUON_FILLED", 0.0)
    monkeypatch.setattr(shared_prefix, "GLUON_FILLED_BY_ONE", 0.0)
    monkeypatch.setattr(shared_prefix, "GLUON_KEYS", 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("processors", [3, 7])
def test_work_items(processors: int, stood_in: None) -> None:
    workspace = Workspace(torch.device("cpu"))
    workspace.processors = processors
    options: dict[str, Any] = {"page": 16, "dim": 32, "dtype": BF16, "hopper": True}
    # More rows than a tile holds; prefixes of many parts, of a tile that is not full, of rows without keys.
    check(
        [(80, [row % 3 for row in range(17)]), (0, [40, 3]), (16, [None, 5])], None, workspace, groups=1, ratio=4, **options
    )
    check([(400, [130, 1]), (16, [None, None])], None, workspace, groups=2, ratio=1, **options)
    check([(48, [0, 0]), (32, [4]), (16, []), (112, [9] * 5)], None, workspace, groups=2, ratio=8, **options)


@pytest.mark.interpreter
def test_work_items_of_levels(stood_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_nested(NESTED, 2, 3, hopper=True, page=16, dim=32, groups=2, ratio=2, dtype=BF16)
    monkeypatch.setattr(shared_prefix, "shared_prefix_tile", lambda *args: configs.Tile(16, 16, 4, 3))
    check_nested([(160, [(240, [70, 3]), (64, [20])])], hopper=True, groups=1, page=16, dim=32, dtype=BF16)


@pytest.mark.interpreter
def test_layers_share_the_work_items(stood_in: None) -> None:
    batch, starts, prefixes = make_shared([(80, [3, 20, 1])], groups=1, page=16, dim=32, dtype=BF16)
    lists: WorkLists = {}
    table, lens = batch.page_table, batch.seq_lens
    for _ in range(2):
        got = paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, table, lens, starts, prefixes, max_group_rows=3, scale=batch.scale,
            hopper=True, work_lists=lists,
        )  # fmt: skip
        assert_attention(batch, got)
        assert len(lists) == 1


def test_where_it_is_worth_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(why_not_prefixes=lambda *given: None))  # type: ignore[arg-type]
    q, pages = torch.zeros(64, 8, 64, dtype=BF16), torch.zeros(1, 16, 2, 64, dtype=BF16)

    def worth(queries: int, keys: int = 8192, softcap: float | None = None) -> bool:
        return shared_prefix.worth_gluon(q, pages, keys, queries, softcap, shared_prefix.PLAIN)

    assert worth(256) and worth(96) and worth(128)
    assert not worth(64) and not worth(144) and not worth(256, 2048) and not worth(256, softcap=30.0)
    # 16 rows of one prompt, half a tile.
    q, pages = torch.zeros(16, 32, 64, dtype=BF16), torch.zeros(1, 16, 8, 64, dtype=BF16)
    assert worth(64, 16384) and not worth(32, 16384) and not worth(64, 8192)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    always(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ratio", "dim", "page", "dtype"),
    [(4, 128, 16, BF16), (1, 64, 16, FP16), (1, 128, 256, BF16), (4, 128, 64, FP16), (8, 256, 16, BF16)],
)
def test_sweep(ratio: int, dim: int, page: int, dtype: torch.dtype, hopper: None) -> None:
    for seed in range(8):
        random = Random(f"{ratio} {dim} {seed}")
        groups = random_groups(random, page, 160 if seed % 2 else 60, 3000)
        groups += [(0, [])] * (64 - len(groups))
        layout = random.choice(("contiguous", "fused"))
        options = {"ratio": ratio, "dim": dim, "page": page, "dtype": dtype, "heads_first": random.random() < 0.3}
        check(groups, hopper=True, most=40, q_layout=layout, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "dtype"), [(4, BF16), (1, FP16)])
def test_levels(ratio: int, dtype: torch.dtype, hopper: None) -> None:
    tree: list[tuple[int, list[Group]]] = [
        (4096, [(512, [100, 5, 0, 1]), (48, [None, 7, 300, 3]), (0, [50]), (1024, [3] * 40)]),
        (0, [(2048, [9, 4])]),
        (1024, [(0, [None, 70]), (16, [1, 2])]),
    ]
    check_nested(tree, 64, 3, hopper=True, ratio=ratio, dim=128, page=16, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "prefix", "count"), [(1, 8192, 1), (64, 4096, 1), (200, 1024, 1), (32, 2048, 6)])
def test_many_samples_of_long_prompts(rows: int, prefix: int, count: int, hopper: None) -> None:
    suffixes: list[int | None] = [(37 * row) % 200 for row in range(rows)]
    options: dict[str, Any] = {"ratio": 4, "dim": 128, "page": 16, "groups": 4, "dtype": BF16, "device": "cuda"}
    runs = [check([(prefix, suffixes)] * count, hopper=True, **options) for _ in range(2)]
    # Bitwise repeatable.
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths_and_groups(hopper: None) -> None:
    options: dict[str, Any] = {"ratio": 4, "dim": 128, "page": 16, "dtype": BF16, "device": "cuda"}
    batch, starts, prefixes = make_shared([(2048, [100, 5, 0]), (512, [3000, None, 7]), (0, [50, 1])], **options)
    page_table, seq_lens, workspace = batch.page_table, batch.seq_lens, Workspace(batch.q.device)

    def launch() -> tuple[Tensor, Tensor]:
        return paged_decode_shared(
            batch.q, batch.k_pages, batch.v_pages, page_table, seq_lens, starts, prefixes,
            max_group_rows=64, scale=batch.scale, workspace=workspace, hopper=True,
        )  # fmt: skip

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch()
    for lengths, bounds, shared in (
        (batch.lengths, [0, 3, 6, 8], [2048, 512, 0]),
        ([2049, 2048, 2048, 512, 0, 519, 50, 1], [0, 3, 6, 8], [2048, 512, 0]),
        ([2148, 2053, 2048, 3512, 0, 519, 50, 1], [0, 2, 3, 3], [2048, 0, 0]),
        ([0] * 8, [0, 3, 6, 8], [2048, 512, 0]),
        (batch.lengths, [0, 3, 6, 8], [1024, 16, 0]),
    ):
        for held, values in ((seq_lens, lengths), (starts, bounds), (prefixes, shared)):
            held.copy_(torch.tensor(values))
        graph.replay()
        rows = [(keys[:n], values[:n]) for (keys, values), n in zip(batch.rows, lengths, strict=True)]
        assert_attention(dataclasses.replace(batch, lengths=lengths, rows=rows), got)
