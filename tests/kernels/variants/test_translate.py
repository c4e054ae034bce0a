"""Translated functions against PyTorch's, element by element: integers, types, look-ups, vectors; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.hooks import HOOKS
from hf_fastattn.kernels.variants.trace import VariantError, trace
from hf_fastattn.kernels.variants.variant import Variant

CPU = torch.device("cpu")
SIZE, DIM = 16, 24


@triton.jit
def scores_kernel(score_ptr, out_ptr, tensors, first, HOOKS: tl.constexpr, SIZE: tl.constexpr):
    m = tl.arange(0, SIZE)[:, None]
    n = tl.arange(0, SIZE)[None, :]
    at = m * SIZE + n
    result = HOOKS.score_mod(tl.load(score_ptr + at), 1, m % 4, m + first, n, tensors)
    tl.store(out_ptr + at, result)


@triton.jit
def vectors_kernel(x_ptr, out_ptr, tensors, HOOKS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    m = tl.arange(0, SIZE)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(x_ptr + m * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + m * BLOCK_D + d, HOOKS.query_transform(x, m % 4, m, tensors))


def assert_scores(function: Callable, *, first: int = 0, exact: bool = True) -> None:
    """`function` of scores [16, 16], heads `i % 4`, queries from `first` on and keys from 0, in Triton as in PyTorch."""
    scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    compiled, out = compile_variant(Variant(score_mod=function), DIM, CPU), torch.empty(SIZE, SIZE)
    scores_kernel[(1,)](scores, out, compiled.tensors, first, compiled.hooks, SIZE)
    m = torch.arange(SIZE, dtype=torch.int32)
    with TransformGetItemToIndex():
        inner = torch.vmap(function, (0, None, None, None, 0))
        want = torch.vmap(inner, (0, None, 0, 0, None))(scores, torch.tensor(1).int(), m % 4, m + first, m)
    torch.testing.assert_close(out, want.float(), atol=0 if exact else 1e-6, rtol=0 if exact else 1e-6)


def assert_vectors(function: Callable) -> None:
    x = torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(2))
    compiled, out = compile_variant(Variant(query_transform=function), DIM, CPU), torch.empty(SIZE, 32)
    vectors_kernel[(1,)](x, out, compiled.tensors, compiled.hooks, SIZE, DIM, 32)
    m = torch.arange(SIZE, dtype=torch.int32)
    with TransformGetItemToIndex():
        want = torch.vmap(function)(x, m % 4, m)
    torch.testing.assert_close(out[:, :DIM], want, atol=1e-6, rtol=1e-5)
    assert not out[:, DIM:].any(), "columns past head_dim are 0"


FACTOR = torch.tensor(2.0)
TABLE = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
INTEGERS = {
    "floor division": lambda s, b, h, q, k: (k - q) // 3,
    "floor division by a negative": lambda s, b, h, q, k: (k - q) // -5,
    "floor division by a power of two": lambda s, b, h, q, k: (k - q) // 4,
    "floor division of tensors": lambda s, b, h, q, k: (k - q) // (h - 5),
    "remainder": lambda s, b, h, q, k: (k - q) % 3,
    "remainder of a power of two": lambda s, b, h, q, k: (k - q) % 8 + s % 2,
    "remainder of a negative": lambda s, b, h, q, k: (k - q) % -7,
    "fmod": lambda s, b, h, q, k: torch.fmod(k - q, 3),
    "truncated division": lambda s, b, h, q, k: torch.div(k - q, 4, rounding_mode="trunc"),
    "shifts": lambda s, b, h, q, k: (q << 2) ^ (k >> 1),
    "bits": lambda s, b, h, q, k: (q & 5) | (~k & 3),
    "powers": lambda s, b, h, q, k: (k - q) ** 3,
    "wraps in 32 bits": lambda s, b, h, q, k: (q + 70_000) * (k + 70_000),
    "64 bits": lambda s, b, h, q, k: ((q + 70_000).long() * (k + 70_000)) % 1_000_003,
    "sign": lambda s, b, h, q, k: torch.sign(k - q),
    "clamp": lambda s, b, h, q, k: (k - q).clamp(-3, 4),
    "minimum": lambda s, b, h, q, k: torch.minimum(q, k) - torch.maximum(h, b),
}
TYPES = {
    "integers divide to a float": lambda s, b, h, q, k: q / (k + 1),
    "float floor division": lambda s, b, h, q, k: s // 0.25,
    "an integer and a float": lambda s, b, h, q, k: (q + 0.5) * s,
    "a bool adds up": lambda s, b, h, q, k: s + (q > k) * 2,
    "where keeps the wider": lambda s, b, h, q, k: torch.where(q > k, q, s),
    "int8 wraps": lambda s, b, h, q, k: (q * 20).to(torch.int8) + 100,
    "bf16 table": lambda s, b, h, q, k: s + TABLE.bfloat16()[h, q],
    "bf16 rounds": lambda s, b, h, q, k: (s.bfloat16() * TABLE.bfloat16()[h, k] + TABLE.bfloat16()[h, q]) * s,
    "a float to an integer": lambda s, b, h, q, k: (s * 3).to(torch.int32),
    "rounding": lambda s, b, h, q, k: torch.round(q * 0.5) + torch.floor(s) + torch.ceil(s) + torch.trunc(s * 4),
    "not": lambda s, b, h, q, k: torch.where(~((q > k) & torch.logical_not(h == 1)), s, -s),
}
LOOK_UPS = {
    "two indices": lambda s, b, h, q, k: s + TABLE[h, q - k + 16],
    "a negative index counts from the end": lambda s, b, h, q, k: s + TABLE[h, k - q],
    "a row, then an element": lambda s, b, h, q, k: s + TABLE[h][k],
    "a number among the indices": lambda s, b, h, q, k: s + TABLE[2, k],
    "a computed table": lambda s, b, h, q, k: s + (TABLE * 2 + 1)[h, k],
    "a slice of a table": lambda s, b, h, q, k: s + TABLE[:, 3:30:2].t()[k % 13, h],
    "an index from a table": lambda s, b, h, q, k: s + TABLE[h, (TABLE[h, k] * 3).abs().long()],
    "a tensor made inside": lambda s, b, h, q, k: torch.maximum(s, torch.tensor(0.25)),
}
FLOATS = {
    "tanh": lambda s, b, h, q, k: 3.0 * torch.tanh(s * 0.01) + torch.tanh(s * 9),
    "exp": lambda s, b, h, q, k: torch.exp(-s.abs()) + torch.exp2(-(h + 1) / 4),
    "logs": lambda s, b, h, q, k: torch.log(q + 1.0) + torch.log1p(s.abs() * 1e-4) + torch.log2(k + 1.0),
    "a power of a number": lambda s, b, h, q, k: 2.0 ** (-h * 0.5) + s**2 - (s.abs() + 1) ** 0.5,
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s) * torch.nn.functional.silu(s),
    "gelu": lambda s, b, h, q, k: torch.nn.functional.gelu(s),
    "softplus": lambda s, b, h, q, k: torch.nn.functional.softplus(s),
    "angles": lambda s, b, h, q, k: torch.sin(s) + torch.cos(q * 0.1) * torch.erf(s),
    "float remainder": lambda s, b, h, q, k: s % 0.7 + s % -0.7,
}
VECTORS = {
    "rotate half": lambda x, h, i: torch.cat((-x[DIM // 2 :], x[: DIM // 2])),
    "pairs": lambda x, h, i: torch.stack((-x[1::2], x[::2]), -1).flatten(),
    "views": lambda x, h, i: x.view(-1, 2).flip(-1).reshape(-1) * x.view(3, 8).t().reshape(-1),
    "roll": lambda x, h, i: x.roll(5) - x.roll(-1),
    "a table": lambda x, h, i: x * TABLE[h][:DIM],
    "rms norm": lambda x, h, i: torch.nn.functional.rms_norm(x, (DIM,)),
    "layer norm": lambda x, h, i: (x - x.mean()) * torch.rsqrt(((x - x.mean()) ** 2).mean() + 1e-5),
    "softmax": lambda x, h, i: torch.softmax(x, -1),
    "chunks": lambda x, h, i: torch.cat((x.chunk(2)[1], x.chunk(2)[0])) + x.unflatten(0, (4, 6)).sum(0).repeat(4),
    "only the index": lambda x, h, i: torch.zeros_like(x) + i,
    "arange": lambda x, h, i: x + torch.arange(DIM) * 0.5,
    "a small matrix product": lambda x, h, i: TABLE[:, :DIM].t() @ x[:4],
    "largest": lambda x, h, i: x / x.abs().amax(),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("first", [0, 100])
def test_integers(name, first):
    assert_scores(INTEGERS[name], first=first)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    assert_scores(TYPES[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name):
    assert_scores(LOOK_UPS[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FLOATS)
def test_floats(name):
    assert_scores(FLOATS[name], exact=False)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    assert_vectors(VECTORS[name])


@pytest.mark.interpreter
def test_offsets_past_32_bits():
    table = torch.zeros(4, 2**30 + 8, dtype=torch.int8)
    table[:, :16] = torch.arange(64).view(4, 16)
    assert_scores(lambda s, b, h, q, k: s + table[h, k])


@pytest.mark.interpreter
def test_a_look_up_outside_of_its_table_is_seen():
    compiled = compile_variant(Variant(score_mod=lambda s, b, h, q, k: s + TABLE[h, k + 30]), DIM, CPU)
    out = torch.empty(SIZE, SIZE)
    scores_kernel[(1,)](torch.zeros(SIZE, SIZE), out, compiled.tensors, 0, compiled.hooks, SIZE)
    assert out[:, 10:].isnan().all() and not out[:, :10].isnan().any()


@triton.jit
def own_score(score, b, h, q_idx, kv_idx, table, factor):
    return score * factor + tl.load(table + kv_idx)


@pytest.mark.interpreter
def test_a_triton_function_is_taken_as_it_is():
    table = torch.arange(16.0)
    variant = Variant(score_mod=own_score, parameters={"table": table, "factor": 2.0})
    compiled, out = compile_variant(variant, DIM, CPU), torch.empty(SIZE, SIZE)
    scores_kernel[(1,)](torch.ones(SIZE, SIZE), out, compiled.tensors, 0, compiled.hooks, SIZE)
    assert torch.equal(out, (2.0 + table).expand(SIZE, SIZE))


@pytest.mark.interpreter
def test_in_place_updates_are_seen():
    table = torch.zeros(16)
    compiled = compile_variant(Variant(score_mod=lambda s, b, h, q, k: s + table[k]), DIM, CPU)
    table += 3.0
    out = torch.empty(SIZE, SIZE)
    scores_kernel[(1,)](torch.ones(SIZE, SIZE), out, compiled.tensors, 0, compiled.hooks, SIZE)
    assert bool((out == 4.0).all())


def test_identity_is_the_graph():
    def identity(factor: float, table: torch.Tensor = TABLE, **fields: object) -> str:
        function = lambda s, b, h, q, k: s * factor + table[h, k]  # noqa: E731
        return compile_variant(Variant(score_mod=function, **fields), DIM, CPU).identity

    same = identity(2.0)
    assert same == identity(2.0, TABLE.clone())
    others = [
        identity(3.0),
        identity(2.0, TABLE.double()),
        identity(2.0, TABLE[:, :20]),
        identity(2.0, normalizer="sigmoid"),
    ]
    assert len({same, *others}) == 5


def test_what_reads_the_row_is_known():
    assert compile_variant(Variant(mask_mod=lambda b, h, q, k: k > b), DIM, CPU).reads_row
    assert not compile_variant(Variant(mask_mod=lambda b, h, q, k: k > q), DIM, CPU).reads_row


def refused(hook: str, function: Callable) -> str:
    with pytest.raises(VariantError) as error:
        compile_variant(Variant(**{hook: function}), DIM, CPU)
    return str(error.value)


def branch(score, b, h, q_idx, kv_idx):
    if q_idx > 3:
        return score
    return -score


def writes(score, b, h, q_idx, kv_idx):
    score += 1
    return score


def writes_outside(score, b, h, q_idx, kv_idx):
    TABLE[0, 0] = 1.0
    return score


def draws(score, b, h, q_idx, kv_idx):
    return score + torch.rand(())


def sorts(q, h, q_idx):
    return torch.sort(q).values


def item(score, b, h, q_idx, kv_idx):
    return score * h.item()


WRONG = {
    "branch": ("score_mod", branch, "test_translate.py:.*if q_idx > 3.*torch.where"),
    "in place": ("score_mod", writes, "score \\+= 1.*in place"),
    "in place, outside": ("score_mod", writes_outside, "TABLE.*in place"),
    "random": ("score_mod", draws, "torch.rand.*aten.rand.*no translation"),
    "sort": ("query_transform", sorts, "torch.sort.*no translation"),
    "item": ("score_mod", item, "h.item.*torch.where"),
    "a vector from a score": ("score_mod", lambda s, b, h, q, k: TABLE[h], r"shape \(40,\).*scalar"),
    "a scalar from a transform": ("query_transform", lambda x, h, i: x.sum(), r"shape \(\).*vector \[24\]"),
    "half a vector": ("key_transform", lambda x, h, i: x[:12], r"shape \(12,\)"),
    "a score from a mask": ("mask_mod", lambda b, h, q, k: q - k, "torch.int32.*bool"),
    "a mask from a score": ("score_mod", lambda s, b, h, q, k: q > k, "torch.bool.*number"),
    "None": ("score_mod", lambda s, b, h, q, k: None, "returns None"),
    "a number": ("mask_mod", lambda b, h, q, k: True, "returns True"),
    "too many indices": ("score_mod", lambda s, b, h, q, k: s + TABLE[h, q, k], "fails with IndexError.*too many"),
    "a Python error": ("score_mod", lambda s, b, h, q, k: s + undefined, "NameError.*undefined"),  # noqa: F821
    "a loop over keys": ("score_mod", lambda s, b, h, q, k: sum(s for _ in range(k)), "depends on the value"),
    "the largest": ("query_transform", lambda x, h, i: x.topk(24).values, "aten.topk.*no translation"),
    "complex numbers": ("score_mod", lambda s, b, h, q, k: torch.complex(s, s).real, "no translation|fails"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    hook, function, words = WRONG[name]
    message = refused(hook, function)
    assert message.startswith(hook)
    assert re.search(words, message), message


def test_tensors_elsewhere_are_refused():
    with pytest.raises(VariantError, match=r"on cpu, but attention runs on meta; move it there with .to\('meta'\)"):
        trace("score_mod", lambda s, b, h, q, k: s + FACTOR, DIM, torch.device("meta"))


def test_every_hook_can_be_traced():
    for hook, arguments in HOOKS.items():
        function = {"mask_mod": lambda b, h, q, k: q >= k, "sink": lambda h: h * 1.0}.get(hook, lambda x, *rest: x * 2)
        assert len(trace(hook, function, DIM, CPU).inputs) == len(arguments)


def test_numbers_that_a_function_makes_need_no_device():
    """PyTorch makes `torch.tensor(7)` on the CPU, and mixes it with tensors elsewhere; a table has to lie there."""
    meta, table = torch.device("meta"), torch.zeros(4)
    traced = trace("mask_mod", lambda b, h, q_idx, kv_idx: kv_idx < torch.minimum(q_idx, torch.tensor(7)), DIM, meta)
    assert len(traced.tensors) == 1
    with pytest.raises(VariantError, match="on cpu, but attention runs on meta"):
        trace("score_mod", lambda score, b, h, q_idx, kv_idx: score + table[0], DIM, meta)
