"""Token choice in kernels: what is kept, how often each token is drawn, and what a draw depends on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.sampling import draw as draw_module
from hf_fastattn.kernels.sampling import reference
from hf_fastattn.kernels.sampling.greedy import greedy_tokens
from hf_fastattn.kernels.sampling.noise import token_noise
from hf_fastattn.kernels.sampling.params import PARAMS, SamplingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Where the sums of the kernel and of the reference may differ: tokens this close to the edge of top-p or min-p.
EDGE = 1e-5
# One test in ten thousand of a right sampler would fail.
LEAST_P_VALUE = 1e-4

FILTERS = [
    SamplingParams(),
    SamplingParams(top_k=1),
    SamplingParams(top_k=50, temperature=0.7),
    SamplingParams(top_k=50, top_p=0.9),
    SamplingParams(top_p=0.9, temperature=0.6),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_p=0.0, temperature=5.0),
    SamplingParams(top_p=0.95, temperature=3.0),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=400, top_p=0.8, min_p=0.01, temperature=1.5),
    SamplingParams(top_k=1_000_000, temperature=1e-20),
]


def logits(rows: int, vocab: int, dtype: torch.dtype, device: str, factor: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, device=device) * factor).to(dtype)


def adversarial(vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows that a threshold search, a bound from maxima of groups, or a sum could stumble over."""
    x = logits(10, vocab, dtype, device)
    x[0] = 1.5
    x[1, vocab // 2] = 1000.0
    x[2] = -math.inf
    x[2, [vocab - 1, vocab // 3]] = torch.tensor([-2.0, -1.0], dtype=dtype, device=device)
    x[3] = x[3].round()
    x[4] = x[4].sort(descending=True).values
    x[5, : vocab // 2] = -math.inf
    x[6] = -x[6].abs() - 100
    x[7, ::2] = 0.0
    x[7, 1::2] = -0.0
    x[8, : min(vocab, 600)] += 20
    x[9, vocab - 1] = math.inf if dtype == FP16 else 3e38
    return x


def draw(
    x: Tensor, params: SamplingParams, *, seed: int = 1, rows: Tensor | None = None, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens `[B]` and thresholds `[B]`; the tokens are written to every second place of a tensor."""
    device = x.device
    rows = torch.arange(len(x), device=device) if rows is None else rows
    wide = torch.full((len(x), 2), -7, device=device)
    thresholds = torch.full((len(x),), math.nan, device=device)
    draw_module.sample_tokens(
        x,
        wide[:, 0],
        params.tensor(device),
        torch.tensor([seed], device=device),
        rows.to(torch.int32),
        torch.tensor([step], device=device),
        thresholds=thresholds,
    )
    assert (wide[:, 1] == -7).all()
    return wide[:, 0], thresholds


def check_kept(x: Tensor, params: SamplingParams) -> None:
    """What is kept is what the reference keeps, and the token is among it."""
    tokens, thresholds = draw(x, params)
    scores = reference.scaled(x, params.temperature)
    kept = scores >= thresholds[:, None]
    strict, loose = kept_at(x, params, -EDGE), kept_at(x, params, EDGE)
    finite = scores > -math.inf
    wrong = finite & ((strict & ~kept) | (kept & ~loose))
    assert not wrong.any(), (params, wrong.sum(-1).tolist(), kept.sum(-1).tolist(), strict.sum(-1).tolist())
    chosen = (kept & finite).gather(1, tokens[:, None])[:, 0]
    assert chosen.all(), (params, tokens, thresholds)


def kept_at(x: Tensor, params: SamplingParams, shift: float) -> Tensor:
    if params.top_p < 1:
        params = replace(params, top_p=min(max(params.top_p + shift, 0.0), 1.0 - 1e-9))
    if 0 < params.min_p < 1:
        params = replace(params, min_p=params.min_p * (1 - shift))
    return reference.kept_tokens(x, params)


def check_frequencies(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's test; tokens expected fewer than five times are taken together."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    assert not counts[probabilities == 0].any()
    pairs = [(counts[~rare].double(), expected[~rare])]
    if expected[rare].sum() >= 5:
        pairs.append((counts[rare].sum()[None].double(), expected[rare].sum()[None]))
    seen, hoped = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    statistic = ((seen - hoped) ** 2 / hoped).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64, device=statistic.device)
    assert torch.special.gammaincc(freedom, statistic / 2) > LEAST_P_VALUE, (statistic, len(seen))


# ---- the reference is what Transformers does


@pytest.mark.parametrize("params", FILTERS[1:-1], ids=str)
def test_reference_is_transformers(params):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    x = logits(4, 1003, FP32, "cpu")
    assert x.unique().numel() == x.numel()
    scores = TemperatureLogitsWarper(params.temperature)(None, x)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    assert torch.equal(reference.kept_tokens(x, params), scores > -math.inf)
    torch.testing.assert_close(reference.probabilities(x, params).float(), scores.softmax(-1), rtol=1e-4, atol=1e-7)


def test_reference_keeps_ties_at_the_kth_as_transformers():
    from transformers import TopKLogitsWarper

    x = logits(4, 1003, FP32, "cpu").round()
    scores = TopKLogitsWarper(50)(None, x)
    assert torch.equal(reference.kept_tokens(x, SamplingParams(top_k=50)), scores > -math.inf)
    assert ((scores > -math.inf).sum(-1) > 50).all()


# ---- kept sets


@pytest.mark.interpreter
@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab", "dtype"), [(20_003, BF16), (1000, FP32), (5, FP16)])
def test_kept(params, vocab, dtype):
    check_kept(logits(1, vocab, dtype, "cpu"), params)


@pytest.mark.interpreter
@pytest.mark.parametrize("params", [FILTERS[3], FILTERS[7]], ids=str)
def test_kept_of_adversarial_rows(params):
    check_kept(adversarial(9001, BF16, "cpu")[:-1], params)


@pytest.mark.interpreter
def test_kept_where_scaling_makes_ties():
    """Logits one bit apart are one score at temperature 3: the second of two falls with the first or stays with it."""
    x = torch.full((1, 64), 7.0)
    for column in range(1, 64):
        x[0, column] = torch.nextafter(x[0, column - 1], torch.tensor(9.0))
    scores = reference.scaled(x, 3.0)
    assert scores.unique().numel() < 50
    for top_k in range(1, 10):
        check_kept(x, SamplingParams(temperature=3.0, top_k=top_k))


@pytest.mark.interpreter
@pytest.mark.parametrize("params", [FILTERS[3], FILTERS[8], FILTERS[10]], ids=str)
def test_too_many_candidates_are_searched_as_a_row(params, monkeypatch):
    x = logits(4, 3000, BF16, "cpu")
    before = draw(x, params)
    monkeypatch.setattr(draw_module, "SLOTS", 1)
    assert all(map(torch.equal, draw(x, params), before))


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("params", [FILTERS[0], FILTERS[3], FILTERS[4], FILTERS[8]], ids=str)
def test_rows_without_a_number_give_a_token(value, params):
    tokens, _ = draw(torch.full((1, 300), value), params)
    assert 0 <= tokens.item() < 300


@pytest.mark.interpreter
def test_nan_is_never_drawn():
    x = torch.full((1, 300), math.nan)
    x[0, 77] = -50.0
    assert all(draw(x, params)[0].item() == 77 for params in (FILTERS[0], FILTERS[3], FILTERS[8]))


# ---- draws


@triton.jit
def noise_kernel(out_ptr, seed_ptr, row, step_ptr, N: tl.constexpr, CHUNK: tl.constexpr):
    token = tl.arange(0, N)
    tl.store(out_ptr + token, token_noise(tl.load(seed_ptr), row, tl.load(step_ptr), token, CHUNK))


def noise(count: int, *, seed: int = 1, row: int = 0, step: int = 0) -> Tensor:
    out = torch.empty(count)
    noise_kernel[(1,)](out, torch.tensor([seed]), row, torch.tensor([step]), count, draw_module.CHUNK)
    return out


@pytest.mark.interpreter
def test_noise_is_gumbel():
    uniform = torch.exp(-torch.exp(-noise(1 << 17).double()))
    assert 0 < uniform.min() < 1e-4 and 1 - 1e-4 < uniform.max() < 1
    for bins in (2, 64, 1000):
        check_frequencies((uniform * bins).long().bincount(minlength=bins), torch.full((bins,), 1 / bins))
    # The tail, where the greatest of many comes from.
    tail = uniform[uniform > 0.99]
    check_frequencies(((tail - 0.99) * 2000).long().bincount(minlength=20), torch.full((20,), 1 / 20))


@pytest.mark.interpreter
def test_noise_differs_by_seed_row_and_step():
    inputs: list[dict[str, int]] = [{}, {"seed": 2}, {"seed": 1 + (1 << 32)}, {"row": 1}, {"step": 1}, {"step": 1 << 32}]
    drawn = torch.stack([noise(1 << 13, **changes) for changes in inputs])
    assert torch.equal(drawn[0], noise(1 << 13))
    assert torch.corrcoef(drawn.double()).triu(1).abs().max() < 0.05
    assert drawn.unique().numel() > 0.99 * drawn.numel()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("params", "rows"), [(FILTERS[0], 150), (SamplingParams(top_k=3), 60), (SamplingParams(top_k=5, min_p=0.3), 60)], ids=str
)
def test_frequencies(params, rows):
    x = torch.full((1, 1024), -math.inf, dtype=BF16)
    x[0, :6] = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.5, 2.0])
    tokens, _ = draw(x.expand(rows, -1), params)
    check_frequencies(tokens.bincount(minlength=1024), reference.probabilities(x, params)[0])


@pytest.mark.interpreter
def test_a_filter_does_not_change_the_noise():
    """A token drawn from all is drawn again from any subset that holds it."""
    x = logits(4, 6000, BF16, "cpu", factor=5.0)
    free, _ = draw(x, SamplingParams())
    for params in (SamplingParams(top_k=200), SamplingParams(top_p=0.99), SamplingParams(min_p=1e-3)):
        kept = reference.kept_tokens(x, params).gather(1, free[:, None])[:, 0]
        assert kept.any()
        assert torch.equal(draw(x, params)[0][kept], free[kept])


def check_batches(x: Tensor, params: SamplingParams) -> None:
    """A row's token does not depend on the rows beside it, nor on its place."""
    tokens, thresholds = draw(x, params)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).to(x.device)
    for chosen in (order, order[: len(x) // 2], order[:1]):
        again, bounds = draw(x[chosen], params, rows=chosen)
        assert torch.equal(again, tokens[chosen])
        assert torch.equal(bounds, thresholds[chosen])


@pytest.mark.interpreter
@pytest.mark.parametrize("params", [FILTERS[0], FILTERS[3], FILTERS[7]], ids=str)
def test_a_draw_depends_on_its_row_only(params):
    check_batches(logits(4, 5000, BF16, "cpu"), params)


@pytest.mark.interpreter
@pytest.mark.parametrize("params", [FILTERS[0], SamplingParams(top_k=50)], ids=str)
def test_rows_and_steps_differ(params):
    x = torch.zeros(3, 5000, dtype=BF16)
    tokens, _ = draw(x, params)
    assert tokens.unique().numel() == 3
    assert not torch.equal(draw(x, params, step=1)[0], tokens)
    assert not torch.equal(draw(x, params, seed=2)[0], tokens)
    assert torch.equal(draw(x, params)[0], tokens)


# ---- greedy


# ---- what does not fit


@pytest.mark.interpreter
def test_nothing_to_choose():
    greedy_tokens(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    draw(torch.zeros(0, 8), SamplingParams())


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x, out, params = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), SamplingParams().tensor("cpu")
    one, rows = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    for wrong in (x[0], x.T, x.double(), x[:, :0]):
        with pytest.raises(ValueError, match="logits"):
            greedy_tokens(wrong, out)
    with pytest.raises(ValueError, match="out_tokens"):
        greedy_tokens(x, out.int())
    for name, values in (
        ("params", (params[:-1], one, rows, one)),
        ("seed", (params, one.int(), rows, one)),
        ("rows", (params, one, rows[:1], one)),
        ("step", (params, one, rows, one.float())),
    ):
        with pytest.raises(ValueError, match=name):
            draw_module.sample_tokens(x, out, *values)
    with pytest.raises(ValueError, match="together"):
        draw_module.choose_tokens(x, out, params=params)


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": math.nan}, {"repetition_penalty": math.inf}],
    ids=str,
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)


def test_params_tensor():
    values = SamplingParams(0.5, 7, 0.25, 0.125, 2.0, 9).tensor("cpu")
    assert values.tolist() == [0.5, 7, 0.25, 0.125, 2, 9] and len(values) == PARAMS


# ---- on the GPU, at the size of a real vocabulary


@pytest.mark.gpu
@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab", "dtype"), [(128_256, BF16), (128_256, FP32), (32_003, FP16), (262_144, BF16)])
def test_sweep_kept(vocab, dtype, params):
    for rows in (1, 16, 64):
        check_kept(logits(rows, vocab, dtype, "cuda", factor=1.0 + rows % 7), params)
    check_kept(adversarial(vocab, dtype, "cuda")[:-1], params)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [FILTERS[0], FILTERS[3], FILTERS[4], FILTERS[7]], ids=str)
def test_sweep_batches(params):
    check_batches(logits(64, 128_256, BF16, "cuda"), params)
    check_batches(logits(64, 5003, FP32, "cuda"), params)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params",
    [SamplingParams(), FILTERS[3], SamplingParams(top_p=0.9, temperature=2.0), SamplingParams(min_p=0.02), FILTERS[10]],
    ids=str,
)
def test_sweep_frequencies(params):
    """A quarter of a million draws from one distribution: 512 rows, 512 steps."""
    x = logits(1, 128_256, BF16, "cuda", factor=3.0).expand(512, -1).contiguous()
    counts = torch.zeros(x.shape[1], dtype=torch.int64, device="cuda")
    rows = torch.arange(len(x), dtype=torch.int32, device="cuda")
    out, values, seed = rows.long(), params.tensor("cuda"), torch.tensor([11], device="cuda")
    steps = 512 if reference.kept_tokens(x[:1], params).sum() < 4096 else 128
    for step in torch.arange(steps, device="cuda").split(1):
        draw_module.sample_tokens(x, out, values, seed, rows, step)
        counts += out.bincount(minlength=len(counts))
    check_frequencies(counts, reference.probabilities(x[:1], params)[0])


@pytest.mark.gpu
def test_one_graph_serves_all_params():
    x = logits(16, 128_256, BF16, "cuda")
    rows = torch.arange(16, dtype=torch.int32, device="cuda")
    out = torch.zeros(16, dtype=torch.int64, device="cuda")
    values, seed, step = SamplingParams().tensor("cuda"), torch.tensor([1], device="cuda"), torch.tensor([0], device="cuda")
    inputs = {"params": values, "seed": seed, "rows": rows, "step": step}
    draw_module.choose_tokens(x, out, **inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw_module.choose_tokens(x, out, **inputs)
        step += 1
    for number, params in enumerate([*FILTERS, *FILTERS[:3]]):
        values.copy_(params.tensor("cuda"))
        x.copy_(logits(16, 128_256, BF16, "cuda", seed=number))
        graph.replay()
        assert step.item() == number + 1
        assert torch.equal(out, draw(x, params, step=number)[0]), params
