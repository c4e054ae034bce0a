"""The experts' products against `reference`, for few tokens and many, whatever the router chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.kernels.experts import few, grouped, router
from hf_fastattn.kernels.experts.configs import (
    FEW_TOKENS,
    GroupedTile,
    down_tile,
    gate_up_tile,
    grouped_tile,
    pairs_a_tile,
)
from hf_fastattn.kernels.experts.mixture import mixture
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.work_list import empty_list
from hf_fastattn.kernels.layer.configs import HOPPER, ProductTile
from hf_fastattn.kernels.layer.split_sums import SplitSums
from tests.kernels.experts.shapes import Layer, check, make_layer, routed, tiles_of, with_wide_tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# By the kernels that they take: those of one token, of several, and of many.
TOKENS = ((1, 1, 1), (2, 5, 16), (17, 70, 17))


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    with_wide_tiles(monkeypatch)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tokens", "dtype"), [pair for tokens in TOKENS for pair in zip(tokens, (BF16, FP16, FP32), strict=True)]
)
def test_shapes(tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(tokens, 136, 72, 5, dtype, strided=True)
    check(layer, routed(layer, 3), repeats=2)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize(
    ("experts", "top_k", "residual", "shared"),
    [(1, 1, True, False), (6, 6, False, False), (7, 2, True, True), (4, 3, False, True)],
)
def test_options(tokens: int, experts: int, top_k: int, residual: bool, shared: bool) -> None:
    layer = make_layer(tokens, 96, 40, experts, residual=residual, shared=shared)
    check(layer, routed(layer, top_k), sums=SplitSums(torch.device("cpu")), weights_settled=True)


def skewed(layer: Layer, experts: list[int]) -> Layer:
    """The same with a router by which every token chooses these experts."""
    weight = torch.zeros_like(layer.weight)
    layer.x[:, 0] = 4.0
    for place, expert in enumerate(experts):
        weight[expert, 0] = 4.0 - place / 4
    return Layer(**{**vars(layer), "weight": weight})


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 6, 30, 70])
def test_all_tokens_to_the_same_experts(tokens: int) -> None:
    layer = skewed(make_layer(tokens, 64, 32, 9), [7, 2])
    routing = routed(layer, 2)
    assert routing.chosen.tolist() == [[7, 2]] * tokens
    check(layer, routing, repeats=2)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_nan_in_experts_that_nobody_chose(tokens: int) -> None:
    layer = skewed(make_layer(tokens, 64, 32, 9), [7, 2])
    others = [expert for expert in range(9) if expert not in (2, 7)]
    for weights in (layer.gate_up_proj, layer.down_proj):
        weights[others] = torch.nan
    assert check(layer, routed(layer, 2)).isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [3, 30])
def test_nan_reaches_only_tokens_that_chose_it(tokens: int, bad: float) -> None:
    layer = make_layer(tokens, 64, 32, 6)
    routing = routed(layer, 2)
    want = check(layer, routing)
    hit = (routing.chosen == routing.chosen[0, 0]).any(1)
    assert 0 < hit.sum() < tokens
    for weights in (layer.gate_up_proj, layer.down_proj):
        weights[int(routing.chosen[0, 0])] = bad
    got = mixture(layer.x, routing, layer.gate_up_proj, layer.down_proj, residual=layer.residual)
    assert torch.equal(got[~hit], want[~hit]) and not got[hit].isfinite().any()


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [2, 5, 16])
def test_split(split: int) -> None:
    layer = make_layer(7, 70, 48, 9)
    routing, sums = routed(layer, 3), SplitSums(torch.device("cpu"))
    states = few.gate_up_silu(layer.x, routing, layer.gate_up_proj)
    want = few.down_sum(states, routing, layer.down_proj, tile=ProductTile(32, 32, 4, 2))
    for _ in range(2):
        got = few.down_sum(states, routing, layer.down_proj, tile=ProductTile(32, 32, 4, 2, split), sums=sums)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        assert not sums.arrived.any()


@pytest.mark.interpreter
@pytest.mark.parametrize(("inner", "top_k", "shared"), [(72, 3, True), (64, 4, False)])
def test_rows_of_one_token_asked_for_at_once(inner: int, top_k: int, shared: bool) -> None:
    layer = make_layer(1, 70, inner, 5, shared=shared)
    routing = routed(layer, top_k)
    layer.down_proj[[e for e in range(5) if e not in routing.chosen]] = torch.nan
    states = few.gate_up_silu(layer.x, routing, layer.gate_up_proj)
    options: dict[str, Any] = {"residual": layer.residual, "shared": layer.shared, "weights_settled": True}
    got, want = (
        few.down_sum(states, routing, layer.down_proj, tile=ProductTile(32, 128, 4, stages), **options) for stages in (1, 2)
    )
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


TILES = {
    "one kind": GroupedTile(16, 32, 32, 4, 2),
    "wide": GroupedTile(128, 64, 64, 4, 3),
    "narrow for few": GroupedTile(32, 16, 32, 4, 2, narrow=16, narrow_k=64),
    "narrow for most": GroupedTile(64, 32, 64, 4, 2, narrow=32, narrow_k=32),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [3, 1000])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles_of_grouped_products(tile: GroupedTile, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "GROUPED_PROGRAMS", programs)
    layer = make_layer(60, 72, 40, 6)
    # A bias of the router: one expert takes every token, the others 4 to 20 each.
    layer.x[:, 0] = 2.0
    layer.weight[5, 0] = 4.0
    routing = routed(layer, 2)
    assert routing.counts is not None
    counts = routing.counts.tolist()
    assert counts[5] == 60 and min(counts) < 16 <= max(counts[:5])
    work = grouped.sort_pairs(routing, tile.block_m)
    assert sorted(work.order.tolist()) == list(range(120))
    assert routing.chosen.flatten()[work.order.long()].tolist() == sorted(routing.chosen.flatten().tolist())
    assert work.tiles[: int(work.tile_count)].tolist() == tiles_of(counts, tile.block_m)
    states = grouped.gate_up_silu(layer.x, routing, work, layer.gate_up_proj, tile=tile)
    got = grouped.down_sum(states, routing, work, layer.down_proj, residual=layer.residual, tile=tile)
    torch.testing.assert_close(got, check(layer, routing), rtol=2e-2, atol=2e-2)


def test_a_list_has_room_for_any_choice() -> None:
    for tokens, top_k, experts, block_m in (
        (64, 8, 128, 64),
        (100, 2, 3, 32),
        (17, 10, 512, 16),
        (1, 1, 1, 64),
        (65, 4, 4, 64),
    ):
        chosen = torch.zeros(tokens, top_k, dtype=torch.int32)
        work = empty_list(Routing(chosen, chosen.float(), counts=torch.zeros(experts, dtype=torch.int32)), block_m)
        # All to the same, and to as many as can be with one pair more than full tiles.
        same = top_k * -(-tokens // block_m)
        spread, left = 0, tokens * top_k
        for _ in range(experts):
            count = min(left, tokens, block_m * ((tokens - 1) // block_m) + 1)
            spread, left = spread + -(-count // block_m), left - count
        assert max(same, spread) <= work.tiles.shape[0] <= experts * -(-tokens // block_m)


def test_tiles_of_sorted_pairs() -> None:
    """An expert's weights are read once wherever all its pairs fit into one tile; most experts have few pairs."""
    for tokens, wide in ((17, 64), (64, 64), (65, 128), (128, 128)):
        for gated in (True, False):
            tile = grouped_tile(HOPPER, 2, tokens, 8, 128, gated)
            assert (tile.block_m, tile.narrow) == (wide, 16)
            assert tile.block_m == pairs_a_tile(HOPPER, 2, tokens, 8, 128)
    assert grouped_tile(HOPPER, 2, 4096, 2, 8, True).narrow == 0
    for tokens, block_m in ((128, 128), (512, 64)):
        assert grouped_tile(HOPPER, 2, tokens, 2, 1 + tokens // 16, False).block_m == block_m
    assert [pairs_a_tile(80, 2, tokens, 8, 128) for tokens in (17, 4096)] == [64, 64]
    assert pairs_a_tile(HOPPER, 4, 300, 2, 8) == 32 and grouped_tile(HOPPER, 4, 300, 2, 8, True).narrow == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5])
def test_sums_go_where_they_are_to(tokens: int) -> None:
    layer = make_layer(tokens, 64, 24, 5)
    routing, out = routed(layer, 2), torch.full((tokens + 1, 64), torch.nan, dtype=layer.x.dtype)
    want = mixture(layer.x, routing, layer.gate_up_proj, layer.down_proj)
    got = mixture(layer.x, routing, layer.gate_up_proj, layer.down_proj, out=out[:tokens])
    assert got.data_ptr() == out.data_ptr() and torch.equal(out[:tokens], want) and out[tokens:].isnan().all()


@pytest.mark.interpreter
def test_no_tokens() -> None:
    layer = make_layer(0, 64, 32, 4)
    routing = router.route(layer.x, layer.weight, 2)
    assert mixture(layer.x, routing, layer.gate_up_proj, layer.down_proj).shape == (0, 64)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused() -> None:
    layer = make_layer(3, 64, 32, 4)
    routing = routed(layer, 2)
    states = few.gate_up_silu(layer.x, routing, layer.gate_up_proj)
    for bad in (layer.gate_up_proj.float(), layer.gate_up_proj[:, :-1], layer.gate_up_proj[:, :, :-1], layer.down_proj[0]):
        with pytest.raises(ValueError, match="gate_up_proj"):
            few.gate_up_silu(layer.x, routing, bad)
    with pytest.raises(ValueError, match="tokens"):
        few.gate_up_silu(layer.x[:2], routing, layer.gate_up_proj)
    with pytest.raises(ValueError, match="down_proj"):
        few.down_sum(states, routing, layer.down_proj[:, :, :-1])
    with pytest.raises(ValueError, match="residual"):
        few.down_sum(states, routing, layer.down_proj, residual=layer.x[:2])
    with pytest.raises(ValueError, match="gate"):
        few.down_sum(states, routing, layer.down_proj, shared=layer.x)
    with pytest.raises(ValueError, match="out"):
        few.down_sum(states, routing, layer.down_proj, out=layer.x[:2])


def test_tiles_of_few_tokens() -> None:
    """Columns are cut without waste where they can be."""
    for k in (768, 1408, 2048, 4096, 14336):
        assert k % gate_up_tile(HOPPER, 2, 1, k, 768).block_k == 0 or k == 1408
        assert down_tile(HOPPER, 2, 1, k, 2048, 8).block_k <= 1024
    assert all(down_tile(HOPPER, 2, tokens, 768, 2048, 8).split > 1 for tokens in range(2, FEW_TOKENS + 1))
    assert down_tile(HOPPER, 2, 8, 14336, 1 << 20, 2).split == 1
    # More experts than registers hold rows of.
    assert [down_tile(HOPPER, 2, 1, 768, 2048, top_k).stages for top_k in (8, 9)] == [1, 4]


SWEEP = {
    "qwen3-30b-a3b": (2048, 768, 128, 8, False),
    # Of its experts as many as leave room on the GPU for other workers, since the truth is computed in fp64.
    "mixtral-8x7b": (4096, 14336, 3, 2, False),
    "qwen2-moe-14b-a2.7b": (2048, 1408, 60, 4, True),
    "odd": (200, 72, 13, 3, True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", SWEEP)
def test_sweep(name: str, dtype: torch.dtype) -> None:
    hidden, inner, experts, top_k, shared = SWEEP[name]
    sums = SplitSums(torch.device("cuda"))
    for tokens in (1, 2, 4, 9, 16, 17, 64, 300):
        layer = make_layer(tokens, hidden, inner, experts, dtype, device="cuda", shared=shared)
        routing = router.route(layer.x, layer.weight, top_k, sums=sums, weights_settled=True, gate_weight=layer.gate_weight)
        check(layer, routing, repeats=3, sums=sums, weights_settled=True)
    assert not sums.arrived.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [40, 100, 300])
def test_an_expert_of_all_tokens_among_others(tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(tokens, 512, 256, 24, dtype, device="cuda")
    layer.x[:, 0] = 2.0
    layer.weight[5, 0] = 4.0
    routing = router.route(layer.x, layer.weight, 2)
    assert routing.counts is not None and routing.counts[5] == tokens and routing.counts.count_nonzero() > 8
    check(layer, routing, repeats=3)
