"""Variants ready to use: the reference against FlexAttention or plain formulas, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, make_batch
from tests.kernels.variants import test_kernels, test_reference
from tests.kernels.variants.mods import Mod
from tests.kernels.variants.test_reference import plan_of, without_compiling  # noqa: F401

HEADS = 8
DOCUMENTS = torch.arange(200).int() // 23
SPANS = torch.tensor([0] * 9 + [1] * 12 + [0] * 5 + [2] * 30 + [0] * 3).int()
BLOCKS = torch.rand(HEADS, 12, 12, generator=torch.Generator().manual_seed(5)) < 0.5
SLOPES, SINKS = built_in.alibi_slopes(HEADS), torch.linspace(-2, 3, HEADS)
PREFIXES, STARTS = torch.tensor([31, 50, 7]).int(), torch.tensor([25, 60, 200]).int()
PARENTS = torch.tensor([-1, 0, 0, 1, 2, 4, 3, -1])


def ancestor(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Whether place `k` of the tree is on the way from place `q` to the root."""
    path = torch.zeros(8, 8, dtype=torch.bool)
    for place in range(8):
        at = place
        while at >= 0:
            path[place, at] = True
            at = int(PARENTS[at])
    return path[q.clamp(0, 7), k.clamp(0, 7)]


def within(q: torch.Tensor, k: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return (q >= first) & (q < end) & (k >= first) & (k < end)


# Each with what it computes, written otherwise: a score and a mask, of which the mask is all that hides.
CASES: dict[str, tuple[Variant, Callable | None, Callable]] = {
    "sliding window": (built_in.sliding_window(20), None, lambda b, h, q, k: (k <= q) & (k > q - 20)),
    "softcap": (built_in.softcap(3.0), lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0), lambda b, h, q, k: k <= q),
    "alibi": (built_in.alibi(SLOPES), lambda s, b, h, q, k: s + SLOPES[h] * (k - q), lambda b, h, q, k: k <= q),
    "sinks and window": (
        built_in.sinks_and_window(4, 20), None, lambda b, h, q, k: (k <= q) & ((k > q - 20) | (k < 4))
    ),
    "chunked": (built_in.chunked(16), None, lambda b, h, q, k: (k <= q) & (k >= q - q % 16)),
    "prefix-LM": (built_in.prefix_lm(31), None, lambda b, h, q, k: (k <= q) | (k < 31)),
    "prefix-LM by row": (built_in.prefix_lm(PREFIXES), None, lambda b, h, q, k: (k <= q) | (k < PREFIXES[b])),
    "bidirectional spans": (
        built_in.bidirectional_spans(SPANS), None,
        lambda b, h, q, k: (k <= q) | within(q, k, 9, 21) | within(q, k, 26, 56),
    ),
    "documents": (built_in.documents(DOCUMENTS), None, lambda b, h, q, k: (k <= q) & (k >= q - q % 23)),
    "documents by row": (
        built_in.documents(DOCUMENTS.expand(3, -1) * torch.tensor([[0], [1], [1]]).int()), None,
        lambda b, h, q, k: (k <= q) & ((b == 0) | (k >= q - q % 23)),
    ),
    "dilated": (built_in.dilated(3, 5), None, lambda b, h, q, k: (k <= q) & (k > q - 13) & (k % 3 == q % 3)),
    "block-sparse": (
        built_in.block_sparse(BLOCKS, 16), None,
        lambda b, h, q, k: (k <= q) & BLOCKS[h, (q // 16).clamp(max=11), (k // 16).clamp(max=11)],
    ),
    "draft tree": (
        built_in.draft_tree(PARENTS, STARTS), None,
        lambda b, h, q, k: (k <= q) & ((k < STARTS[b]) | ancestor(q - STARTS[b], k - STARTS[b])),
    ),
}  # fmt: skip
# New tokens and earlier ones of each row: a prefill, and appends, of which two end in trees of drafts.
BATCHES = {"prefill": ([23, 60], [0, 0]), "append": ([8, 1, 5], [25, 60, 120]), "decode": ([1, 1, 1], [20, 90, 140])}


def make(kind: str) -> Batch:
    return make_batch(*BATCHES[kind], page=16, ratio=4, groups=2, dim=16, scattered=True)


def reference(batch: Batch, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    return variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant, scale=batch.scale)


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_equals_flex_attention(name, kind):
    variant, score, mask = CASES[name]
    batch = make(kind)
    out, _ = reference(batch, variant)
    torch.testing.assert_close(out, test_reference.flex(batch, Mod(score, mask, causal=False)), atol=1e-5, rtol=1e-5)


def dense_scores(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores `[H, S, L]` with causality, and values `[H, L, D]`, of each row."""
    found = []
    for q, (keys, values), length in zip(batch.q.split(batch.counts), batch.rows, batch.lengths, strict=True):
        keys, values = (x.repeat_interleave(4, 1).transpose(0, 1) for x in (keys, values))
        scores = torch.matmul(q.transpose(0, 1), keys.transpose(1, 2)) * batch.scale
        hidden = torch.ones(len(q), length).triu(length - len(q) + 1).bool()
        found.append((scores.masked_fill(hidden, -torch.inf), values))
    return found


@pytest.mark.parametrize("kind", BATCHES)
def test_sinks_take_part_in_the_sum(kind):
    batch = make(kind)
    out, _ = reference(batch, built_in.sinks(SINKS))
    wants = []
    for scores, values in dense_scores(batch):
        more = torch.cat((scores, SINKS[:, None, None].expand(-1, scores.shape[1], 1)), -1)
        wants.append((more.softmax(-1)[..., :-1] @ values).transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(wants), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BATCHES)
def test_sigmoid(kind):
    batch = make(kind)
    out, _ = reference(batch, built_in.sigmoid(-2.0))
    want = torch.cat([((scores - 2.0).sigmoid() @ values).transpose(0, 1) for scores, values in dense_scores(batch)])
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*CASES, "sinks", "sigmoid"])
def test_in_kernels(name):
    """In decode or prefill; heads are those that the tables were made for."""
    more = {"sinks": built_in.sinks(SINKS), "sigmoid": built_in.sigmoid(-2.0)}
    variant = more[name] if name in more else CASES[name][0]
    for kind in ("decode", "append" if name == "draft tree" else "prefill"):
        test_kernels.check(variant, kind, ratio=4, groups=2)


def test_slopes_of_alibi():
    """As in the paper for 8 heads; for 12 those of 8, then every second one of 16."""
    torch.testing.assert_close(built_in.alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(built_in.alibi_slopes(12)[8:], torch.tensor([2.0 ** -(i / 2) for i in (1, 3, 5, 7)]))


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: built_in.chunked(0), "chunk=0"),
        (lambda: built_in.sinks_and_window(4, 0), "window=0"),
        (lambda: built_in.dilated(0), "dilation=0"),
        (lambda: built_in.documents(torch.rand(4)), "numbers is torch.float32"),
        (lambda: built_in.bidirectional_spans(torch.zeros(2, 2, 2).int()), "spans is torch.int32"),
        (lambda: built_in.block_sparse(torch.zeros(4, 4), 16), "blocks is torch.float32"),
        (lambda: built_in.block_sparse(torch.zeros(4, 4).bool(), 0), "size=0"),
        (lambda: built_in.draft_tree(torch.tensor([-1, 1]), STARTS), r"parents\[1\]=1"),
        (lambda: built_in.sliding_window(0), "window=0"),
    ],
)
def test_wrong_arguments(make_wrong, message):
    with pytest.raises(ValueError, match=message):
        make_wrong()
