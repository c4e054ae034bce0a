"""How often a kernel is compiled: not again for another batch size, table width or window, and seldom in all."""

from __future__ import annotations

import pytest

from tests.kernels import compile_cases
from tests.kernels.specialised import BY_SWEEPS, BY_TESTS
from tests.kernels.sweep import MOST_SPECIALISATIONS
from tests.tools.fake_driver import counting_driver
from tests.tools.targets import TARGETS

# Of the products, norms and activations: those of 9 shapes at 1 to 64 tokens, of the splits, and of 9 shapes with LoRA.
STEP_KERNELS = {"rms_norm_kernel", "silu_and_mul_kernel", "matvec_kernel", "skinny_kernel"}
MOST_OF_STEP = 130
# Of the products of 2 to 16 tokens: those of a dozen shapes at up to 8 tokens and at more, in two dtypes.
FEW_ROWS_KERNELS = {"few_rows_kernel"}
MOST_OF_FEW_ROWS = 160
# Of token choice: those of three dtypes, vocabularies divisible by 16 or not, and three sizes of the table of maxima.
SAMPLING_KERNELS = {
    "scan_logits_kernel",
    "draw_kernel",
    "greedy_chunk_kernel",
    "best_of_chunks_kernel",
    "process_logits_kernel",
    "suppress_eos_kernel",
    "typical_kernel",
    "token_logprobs_kernel",
}
MOST_OF_SAMPLING = 100
# Of the shared prefixes: those of 5 shapes with few and with many rows, and of the long prompts.
PREFIX_KERNELS = {"prefixes_kernel", "suffix_kernel"}
MOST_OF_PREFIXES = 50
# Of the end of a step: those of 9 blocks of rows, with one window and two, with and without tokens seen.
LOOP_KERNELS = {"advance_kernel"}
MOST_OF_LOOP = 40

# Of mixtures of experts: those of 4 shapes in two dtypes, of one token, of several, and of many.
EXPERT_KERNELS = {*compile_cases.ONE, *compile_cases.SEVERAL, *compile_cases.MANY}
MOST_OF_EXPERTS = 220
# Of linear attention: those of a few shapes in three dtypes, of steps, of prompts, and of prompts that go on.
LINEAR_KERNELS = {*compile_cases.DELTA, "delta_step_kernel"}
MOST_OF_LINEAR = 60

# What a loop of generate() changes from one step or call to the next.
LAUNCHES = {
    "append, tokens": [lambda n=n: compile_cases.append(8, 2, 64, tokens=n) for n in (1, 2, 16, 100)],
    # Of as many rows as take one tile.
    "decode, rows": [lambda n=n: compile_cases.decode(4, 64, rows=n) for n in (1, 15, 16)],
    "decode, columns": [lambda n=n: compile_cases.decode(4, 64, columns=n) for n in (1, 2, 16)],
    "decode, window": [lambda n=n: compile_cases.decode(4, 64, window=n) for n in (1, 10, 16)],
    "shared prefix, rows": [lambda n=n: compile_cases.shared_prefix(4, 64, rows=n) for n in (1, 2, 16)],
    "shared prefix, groups": [lambda n=n: compile_cases.shared_prefix(4, 64, groups=n) for n in (1, 2, 16)],
    "shared prefix, columns": [lambda n=n: compile_cases.shared_prefix(4, 64, columns=n) for n in (1, 2, 16)],
    "prefill, rows": [lambda n=n: compile_cases.prefill(4, 64, tokens=512, rows=n) for n in (1, 2, 16)],
    "prefill, columns": [lambda n=n: compile_cases.prefill(4, 64, columns=n) for n in (1, 2, 16)],
    "prefill, tokens": [lambda n=n: compile_cases.prefill(4, 64, tokens=n) for n in (100, 128)],
    "work list, rows": [lambda n=n: compile_cases.tiles(n) for n in (1, 3, 16)],
    "merge, rows": [lambda n=n: compile_cases.merge(64, compile_cases.BF16, tokens=n) for n in (1, 3, 16)],
    "add and norm, tokens": [lambda n=n: compile_cases.add_norm(896, tokens=n) for n in (1, 3, 16)],
    "activation, tokens": [lambda n=n: compile_cases.activation(n, 4864) for n in (1, 3, 16)],
    "product, rows": [lambda n=n: compile_cases.product(1, 896, (n, 8)) for n in (1, 3, 16)],
    "lora, tokens": [lambda n=n: compile_cases.adapted(n, 896, (64, 8), (8, 8)) for n in (2, 3, 16)],
    "lora, stacked": [lambda n=n: compile_cases.adapted(n, 896, (64, 8), (8, 8), stacked=True) for n in (2, 3, 16)],
    "product, few tokens": [lambda n=n: compile_cases.product(n, 896, (64, 8)) for n in (2, 3, 8)],
    "product, up to 16 tokens": [lambda n=n: compile_cases.product(n, 896, (64, 8)) for n in (9, 12, 16)],
    "product, tokens": [lambda n=n: compile_cases.product(n, 896, (64, 8)) for n in (17, 18, 32)],
    "short rows": [lambda n=n: compile_cases.short(4, 64, rows=n) for n in (1, 3, 8)],
    "experts, tokens": [lambda n=n: compile_cases.experts_of(n, 256, 128, 4, 2) for n in (9, 12, 16)],
    "router, many tokens": [lambda n=n: compile_cases.routed(n, 256, 4, 2) for n in (17, 18, 32)],
    "advance, rows": [lambda n=n: compile_cases.advanced(n) for n in (33, 48, 64)],
    "advance, columns": [lambda n=n: compile_cases.advanced(columns=n) for n in (1024, 2048, 8192)],
    "repetition penalty, rows": [lambda n=n: compile_cases.processed(rows=n) for n in (1, 3, 16)],
    "repetition penalty, eos": [lambda n=n: compile_cases.processed(eos=n) for n in (1, 3, 16)],
    "no end of sequence": [lambda n=n: compile_cases.processed(rows=n, eos=n, penalty=False) for n in (1, 3, 16)],
}


@pytest.mark.parametrize("launches", LAUNCHES.values(), ids=LAUNCHES)
def test_one_binary_serves_all(launches):
    with counting_driver(TARGETS["sm_90"]) as fake:
        for launch in launches:
            launch()
        assert len(fake.compiled()) == len(fake.launched)


@pytest.mark.parametrize("greedy", [False, True])
def test_token_choice_is_compiled_once(greedy):
    with counting_driver(TARGETS["sm_90"]) as fake:
        for rows in (1, 3, 16):
            compile_cases.chosen(rows=rows, greedy=greedy)
        assert len(fake.compiled()) == 2


@pytest.mark.gpu
def test_the_sweep_needs_few_specialisations():
    """Comes after the sweeps, in the order of the files."""
    limits = (
        (STEP_KERNELS, MOST_OF_STEP),
        (FEW_ROWS_KERNELS, MOST_OF_FEW_ROWS),
        (SAMPLING_KERNELS, MOST_OF_SAMPLING),
        (PREFIX_KERNELS, MOST_OF_PREFIXES),
        (LOOP_KERNELS, MOST_OF_LOOP),
        (EXPERT_KERNELS, MOST_OF_EXPERTS),
        (LINEAR_KERNELS, MOST_OF_LINEAR),
    )
    for kernels, most in limits:
        assert sum(BY_TESTS[name] for name in kernels) <= most, BY_TESTS
    others = BY_SWEEPS.keys() - set[str]().union(*(kernels for kernels, _ in limits))
    assert sum(BY_SWEEPS[name] for name in others) <= MOST_SPECIALISATIONS, BY_SWEEPS
