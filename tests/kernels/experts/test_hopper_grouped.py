"""The Gluon products of experts on Hopper against `reference`, and the list that they work by."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.experts import router
from hf_fastattn.kernels.experts.mixture import mixture
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.sorted_rows import sort_rows
from tests.kernels.cases import assert_close
from tests.kernels.experts.shapes import Layer, make_layer, outputs, routed, tiles_of

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.interpreter
@pytest.mark.parametrize(("experts", "top_k", "block_m"), [(5, 3, 8), (1, 1, 16), (7, 7, 4), (24, 20, 16)])
def test_rows_and_tiles(experts: int, top_k: int, block_m: int) -> None:
    layer = make_layer(37, 40, 8, experts, strided=True)
    routing = routed(layer, top_k)
    rows, work = sort_rows(layer.x, routing, block_m)
    order = work.order.long()
    assert sorted(order.tolist()) == list(range(37 * top_k))
    assert torch.equal(rows, layer.x[order // top_k])
    assert routing.chosen.flatten()[order].tolist() == sorted(routing.chosen.flatten().tolist())
    assert routing.counts is not None
    assert work.tiles[: int(work.tile_count)].tolist() == tiles_of(routing.counts.tolist(), block_m)


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def gluon(layer: Layer, routing: Routing, programs: int | None = None, block_m: int = 128) -> torch.Tensor:
    from hf_fastattn.kernels.experts import hopper_grouped

    rows, work = sort_rows(layer.x, routing, block_m)
    states = hopper_grouped.gate_up_silu(rows, work, routing, layer.gate_up_proj, programs=programs)
    options: dict[str, Any] = {"residual": layer.residual, "shared": layer.shared, "programs": programs}
    return hopper_grouped.down_sum(states, work, routing, layer.down_proj, **options)


def check(layer: Layer, routing: Routing, programs: int | None = None) -> torch.Tensor:
    """The Gluon output, within the criterion, and bitwise repeatable."""
    got = gluon(layer, routing, programs)
    other = gluon(layer, routing, programs, block_m=192)
    exact = Routing(routing.chosen, routing.weights.double(), gate=None if routing.gate is None else routing.gate.double())
    want, exact_want = outputs(layer, routing), outputs(layer.to(torch.float64), exact)
    for found in (got, other):
        assert_close("mixture", found, want, exact_want)
    assert torch.equal(gluon(layer, routing, programs), got)
    return got


def chosen_by(layer: Layer, top_k: int) -> Routing:
    return router.route(layer.x, layer.weight, top_k, gate_weight=layer.gate_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("hidden", "inner", "experts", "top_k", "shared"),
    [(2048, 768, 16, 8, False), (256, 128, 5, 2, True), (200, 72, 13, 3, True), (64, 1000, 3, 3, False)],
)
def test_shapes(
    hopper: None, hidden: int, inner: int, experts: int, top_k: int, shared: bool, dtype: torch.dtype
) -> None:  # fmt: skip
    numbers = random.Random(hidden)
    for tokens in (17, 64, 128, 300, 1000):
        layer = make_layer(tokens, hidden, inner, experts, dtype, device="cuda", shared=shared, strided=True)
        check(layer, chosen_by(layer, top_k), numbers.choice((None, 1, 7)))


@pytest.mark.gpu
def test_all_tokens_to_one_expert_and_nan_in_the_others(hopper: None) -> None:
    layer = make_layer(700, 256, 136, 6, device="cuda")
    layer.x[:, 0] = 4.0
    layer.weight.zero_()
    layer.weight[4, 0], layer.weight[1, 0] = 4.0, 3.0
    routing = chosen_by(layer, 2)
    assert routing.chosen.unique().tolist() == [1, 4]
    for weights in (layer.gate_up_proj, layer.down_proj):
        weights[[0, 2, 3, 5]] = torch.nan
    assert check(layer, routing, 5).isfinite().all()


@pytest.mark.gpu
def test_nan_of_an_expert_reaches_only_tokens_that_chose_it(hopper: None) -> None:
    layer = make_layer(300, 136, 72, 6, device="cuda")
    routing = chosen_by(layer, 2)
    want = check(layer, routing)
    hit = (routing.chosen == 3).any(1)
    for weights in (layer.gate_up_proj, layer.down_proj):
        weights[3] = torch.nan
    got = gluon(layer, routing)
    assert 0 < hit.sum() < 300
    assert torch.equal(got[~hit], want[~hit]) and not got[hit].isfinite().any()


@pytest.mark.gpu
def test_a_captured_graph_follows_the_choice(hopper: None) -> None:
    layer, other = (make_layer(400, 256, 128, 8, device="cuda", seed=seed) for seed in (0, 1))
    arguments = (layer.gate_up_proj, layer.down_proj)

    def step() -> torch.Tensor:
        routing = chosen_by(layer, 4)
        return mixture(layer.x, routing, *arguments, residual=layer.residual, hopper=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    layer.x.copy_(other.x)
    graph.replay()
    assert torch.equal(out, step())


@pytest.mark.gpu
def test_the_mixture_takes_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastattn.kernels.experts import hopper_grouped

    taken = []
    monkeypatch.setattr(hopper_grouped, "down_sum", lambda *args, **options: taken.append(True))
    for tokens, dtype in ((1000, BF16), (1000, torch.float32), (20, BF16)):
        layer = make_layer(tokens, 64, 32, 4, dtype, device="cuda")
        for asked in (True, False):
            mixture(layer.x, chosen_by(layer, 2), layer.gate_up_proj, layer.down_proj, hopper=asked)
    assert taken == [True]
