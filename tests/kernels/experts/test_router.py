"""The router against `reference.route`, and that against Transformers' own routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_fastattn.kernels.experts import reference, router
from hf_fastattn.kernels.layer.split_sums import SplitSums
from tests.kernels.experts.shapes import make_layer, routed
from tests.tools.combinations import pairwise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Few tokens, and more than the single launch takes.
TOKENS = (1, 2, 5, 16, 17, 40)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "tokens", "shape"),
    # The last shape is slow.
    [
        *pairwise([BF16, FP16, FP32], TOKENS, [(64, 8, 2), (200, 13, 5), (48, 6, 6), (32, 1, 1)]),
        *((BF16, tokens, (2100, 128, 8)) for tokens in (1, 2, 5)),
    ],
)
def test_choice(dtype: torch.dtype, tokens: int, shape: tuple[int, int, int]) -> None:
    hidden, experts, top_k = shape
    routed(make_layer(tokens, hidden, 16, experts, dtype, strided=True, seed=tokens), top_k)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(
    "options",
    [{"normalise": False}, {"rounds_weights": True}, {"scoring": "sigmoid"}, {"weights_settled": True}],
)
def test_options(tokens: int, options: dict[str, Any]) -> None:
    layer = make_layer(tokens, 64, 16, 9, shared=True)
    settled = {"weights_settled": True} if options.pop("weights_settled", False) else {}
    want = routed(layer, 4, **options)
    got = router.route(layer.x, layer.weight, 4, gate_weight=layer.gate_weight, **options, **settled)
    assert torch.equal(got.chosen, want.chosen) and torch.equal(got.weights, want.weights)
    assert torch.equal(got.weights, got.weights.to(layer.x.dtype).float()) == options.get("rounds_weights", False)
    plain = reference.route(layer.x, layer.weight, 4, gate_weight=layer.gate_weight)
    torch.testing.assert_close(got.gate, plain.gate, rtol=1e-2, atol=1e-2)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_of_equal_scores_the_lowest_index(tokens: int) -> None:
    layer = make_layer(tokens, 32, 16, 8)
    weight = layer.weight.clone()
    # Experts 1, 3, 4 and 6 are alike, and so are all others.
    weight[[1, 3, 4, 6]] = layer.x.mean(0)
    weight[[0, 2, 5, 7]] = -layer.x.mean(0)
    x = layer.x.mean(0).expand(tokens, -1).contiguous()
    got = router.route(x, weight, 6)
    assert got.chosen.tolist() == [[1, 3, 4, 6, 0, 2]] * tokens
    assert torch.equal(got.chosen, reference.route(x, weight, 6).chosen)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "little"), [(BF16, 2.0**-9), (FP16, 2.0**-12)])
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_tie_that_rounding_makes(dtype: torch.dtype, little: float, tokens: int) -> None:
    """Logits are compared as the model's dtype holds them: a greater sum that is rounded to the same is no greater."""
    x, weight = torch.zeros(tokens, 32, dtype=dtype), torch.zeros(6, 32, dtype=dtype)
    x[:, :2] = 1
    weight[[1, 4], 0] = 1
    weight[4, 1] = little
    assert float((x[:1].float() @ weight[4].float()).squeeze()) > 1
    for scoring in ("softmax", "sigmoid"):
        got = router.route(x, weight, 2, scoring=scoring)
        assert got.chosen.tolist() == [[1, 4]] * tokens and (got.weights == 0.5).all()
        assert torch.equal(got.chosen, reference.route(x, weight, 2, scoring=scoring).chosen)
    weight[4, 1] = 16 * little
    assert router.route(x, weight, 2).chosen.tolist() == [[4, 1]] * tokens


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [2, 16])
def test_experts_are_listed_once(tokens: int) -> None:
    sums = SplitSums(torch.device("cpu"))
    layer = make_layer(tokens, 32, 16, 12)
    got = router.route(layer.x, layer.weight, 3, sums=sums)
    assert got.distinct is not None and got.distinct_count is not None
    assert got.distinct[: int(got.distinct_count)].tolist() == sorted(set(got.chosen.flatten().tolist()))
    assert not sums.arrived.any()


@pytest.mark.interpreter
def test_pairs_are_counted_and_numbered() -> None:
    layer = make_layer(50, 32, 16, 12)
    got = router.route(layer.x, layer.weight, 3)
    assert got.counts is not None and got.ranks is not None
    assert torch.equal(got.counts.long(), got.chosen.flatten().long().bincount(minlength=12))
    for expert in range(12):
        assert sorted(got.ranks[got.chosen == expert].tolist()) == list(range(int(got.counts[expert])))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_in_one_token(tokens: int) -> None:
    """It chooses experts that there are, each once; the other tokens choose as without it."""
    layer = make_layer(tokens, 32, 16, 5)
    want = router.route(layer.x, layer.weight, 3)
    layer.x[0, 3] = torch.nan
    got = router.route(layer.x, layer.weight, 3)
    assert got.chosen[0].tolist() == [0, 1, 2] and got.weights[0].isnan().all()
    assert torch.equal(got.chosen[1:], want.chosen[1:]) and torch.equal(got.weights[1:], want.weights[1:])


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for change in ({"x": x.double()}, {"weight": weight.bfloat16()}, {"weight": weight[:, :7]}, {"top_k": 5}, {"top_k": 0}):
        with pytest.raises(ValueError, match="must|is not"):
            router.route(**{"x": x, "weight": weight, "top_k": 2, **change})
    with pytest.raises(ValueError, match="scoring"):
        router.route(x, weight, 2, scoring="tanh")
    with pytest.raises(ValueError, match="gate_weight"):
        router.route(x, weight, 2, gate_weight=torch.zeros(2, 8))


ROUTERS = {
    "Mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 3}, {}),
    "Qwen2Moe": ({"num_experts": 8, "num_experts_per_tok": 3}, {"normalise": False, "rounds_weights": True}),
    "Qwen3Moe": ({"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}, {"rounds_weights": True}),
}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ROUTERS)
def test_reference_is_transformers(name: str, dtype: torch.dtype) -> None:
    entries, options = ROUTERS[name]
    config = getattr(transformers, f"{name}Config")(hidden_size=64, **entries)
    module = __import__(f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=["x"])
    gate = getattr(module, f"{name}TopKRouter")(config).to(dtype)
    torch.manual_seed(1)
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(30, 64).to(dtype)
    _, weights, chosen = gate(x)
    got = reference.route(x, gate.weight, 3, **options)
    # Of experts whose logits are equal in this dtype, Transformers' top-k takes any.
    logits = torch.nn.functional.linear(x, gate.weight)
    untied = torch.tensor([len(set(row)) == len(row) for row in logits.tolist()])
    assert untied.sum() > 10 and torch.equal(got.chosen[untied].long(), chosen[untied])
    assert torch.equal(got.weights[untied], weights[untied].float())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 1024])
@pytest.mark.parametrize(("hidden", "experts", "top_k"), [(2048, 128, 8), (4096, 8, 2), (2048, 60, 4), (2048, 512, 10)])
def test_sweep(tokens: int, hidden: int, experts: int, top_k: int) -> None:
    """Scores of what was chosen are those of the reference, but where a sum was rounded otherwise."""
    layer = make_layer(tokens, hidden, 16, experts, device="cuda", shared=True)
    sums = SplitSums(torch.device("cuda"))
    for _ in range(3):
        got = router.route(layer.x, layer.weight, top_k, sums=sums, weights_settled=True, gate_weight=layer.gate_weight)
        want = reference.route(layer.x, layer.weight, top_k, gate_weight=layer.gate_weight)
        assert (got.chosen == want.chosen).float().mean() > 0.97
        torch.testing.assert_close(got.weights, want.weights, rtol=2e-2, atol=2e-3)
        assert got.chosen.sort(-1).values.diff(dim=-1).min() > 0 if top_k > 1 else True
