"""The shapes of the experts' benchmark, their inputs, and the check that comes before every figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_fastattn.eval.choices import SHAPES
from hf_fastattn.kernels.experts import reference
from hf_fastattn.kernels.experts.routing import Routing

# Above so many tokens pairs are counted and numbered, as the router does: `experts.configs.FEW_TOKENS`.
FEW_TOKENS = 16
# Choices that a measurement rotates over, so that few weights are found in the second-level cache.
SETS = 8
CHECKED = 16


@dataclass(frozen=True)
class Experts:
    """Sizes of a model's mixture."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Inputs:
    """Of one line of the table: weights, and tokens with where they go, in SETS variants."""

    sizes: Experts
    gate_up_proj: Tensor
    down_proj: Tensor
    x: list[Tensor]
    routings: list[Routing]

    @property
    def distinct(self) -> float:
        """Experts that some token chose, the mean of all variants."""
        return sum(routing.chosen.unique().numel() for routing in self.routings) / len(self.routings)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights of these experts."""
        return self.distinct * (self.gate_up_proj[0].nbytes + self.down_proj[0].nbytes)

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 6.0 * self.routings[0].chosen.numel() * self.sizes.hidden * self.sizes.inner


def experts_of(name: str) -> Experts:
    """The sizes of one of `SHAPES`, which has experts; "small" for a machine without a GPU."""
    if name == "small":
        return Experts("small", 128, 64, 16, 4)
    shape = SHAPES[name]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    experts = shape["num_experts"] if "num_experts" in shape else shape["num_local_experts"]
    return Experts(name, shape["hidden_size"], inner, experts, shape["num_experts_per_tok"])


def make_inputs(
    sizes: Experts, tokens: int, routing: str, weights: tuple[Tensor, Tensor], device: torch.device
) -> Inputs:  # fmt: skip
    """Random tokens, and choices of one of `ROUTINGS`: any experts, popular ones by Zipf's law, the same for all tokens."""
    like = weights[0]
    x = [torch.randn(tokens, sizes.hidden, device=device).to(like.dtype) for _ in range(SETS)]
    chosen = [_chosen(sizes, tokens, routing, device) for _ in range(SETS)]
    return Inputs(sizes, *weights, x, [_routing(choice, sizes.experts) for choice in chosen])


def make_weights(sizes: Experts, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gate_up_proj: [E, 2 I, H]` and `down_proj: [E, H, I]`, of the size that keeps values near 1."""
    gate_up = torch.empty(sizes.experts, 2 * sizes.inner, sizes.hidden, device=device, dtype=dtype)
    down = torch.empty(sizes.experts, sizes.hidden, sizes.inner, device=device, dtype=dtype)
    return gate_up.normal_(0, sizes.hidden**-0.5), down.normal_(0, sizes.inner**-0.5)


def _chosen(sizes: Experts, tokens: int, routing: str, device: torch.device) -> Tensor:
    if routing == "one":
        # The experts of a token are all different, so that one expert for all tokens means K of them.
        return torch.randperm(sizes.experts, device=device)[: sizes.top_k].expand(tokens, -1).contiguous()
    scores = torch.rand(tokens, sizes.experts, device=device).log().neg().log().neg()
    if routing == "zipf":
        scores = scores - torch.arange(1, sizes.experts + 1, device=device).log()
    return scores.topk(sizes.top_k).indices


def _routing(chosen: Tensor, experts: int) -> Routing:
    """What the router would give for these choices."""
    tokens, top_k = chosen.shape
    weights = torch.rand(tokens, top_k, device=chosen.device).softmax(-1)
    numbers = chosen.int().contiguous()
    if tokens == 1:
        return Routing(numbers, weights)
    if tokens <= FEW_TOKENS:
        used = chosen.unique().int()
        distinct = functional.pad(used, (0, min(tokens * top_k, experts) - used.numel()))
        return Routing(numbers, weights, distinct, torch.tensor([used.numel()], dtype=torch.int32, device=chosen.device))
    flat = chosen.flatten()
    counts = flat.bincount(minlength=experts)
    order = flat.argsort()
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(flat.numel(), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    return Routing(numbers, weights, counts=counts.int(), ranks=ranks.view(tokens, top_k).int())


def agrees(inputs: Inputs, out: Tensor) -> bool:
    """At most twice PyTorch's error in the same dtype, on the first tokens of the first variant."""
    x, routing = inputs.x[0][:CHECKED], inputs.routings[0]
    few = Routing(routing.chosen[:CHECKED], routing.weights[:CHECKED])
    plain = reference.down_sum(reference.gate_up_silu(x, few, inputs.gate_up_proj), few, inputs.down_proj).double()
    exact = torch.zeros_like(plain)
    for token, slot, expert in _pairs(few.chosen):
        gate, up = functional.linear(x[token].double(), inputs.gate_up_proj[expert].double()).chunk(2)
        product = functional.linear(functional.silu(gate) * up, inputs.down_proj[expert].double())
        exact[token] += few.weights[token, slot].double() * product
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    return bool((out[:CHECKED].double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor)


def _pairs(chosen: Tensor) -> Iterator[tuple[int, int, int]]:
    for token, experts in enumerate(chosen.tolist()):
        for slot, expert in enumerate(experts):
            yield token, slot, expert
