"""Every kernel on small batches with odd edges, each checked, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitize decode shared_prefix

Names choose among `RUNS`. Every tensor is an allocation of its own, so that a step past its end is seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

if __name__ == "__main__":
    # Before torch is imported, and in no process that only collects tests: nothing can be captured under it.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from hf_fastattn.kernels.layer.split_sums import SplitSums
from hf_fastattn.kernels.page_formats import KV_DTYPES
from tests.kernels.attention import (
    test_append,
    test_decode,
    test_hopper,
    test_merge,
    test_new_token,
    test_prefill,
    test_rope_tables,
    test_shared_prefix,
    test_short_row,
    test_work_list,
)
from tests.kernels.cases import in_eight_bits, make_batch
from tests.kernels.layer import test_activation, test_few_rows, test_lora, test_matvec, test_norm, test_one_wave
from tests.kernels.linear import test_delta_prefill, test_delta_step
from tests.kernels.sampling import test_advance, test_greedy, test_logprobs, test_typical
from tests.kernels.sampling import test_draw as test_sampling
from tests.kernels.sampling import test_penalty as test_sampling_penalty
from tests.kernels.sweep import Shape

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = (Shape(4, 128, 16, BF16), Shape(7, 80, 64, FP16, window=True, softcap=30.0), Shape(2, 64, 16, FP32))


def attention(check: Callable[..., object], counts: list[int], pasts: list[int], shapes: tuple[Shape, ...] = SHAPES) -> None:
    for shape in shapes:
        window = 40 if shape.window else None
        options = {"page": shape.page, "groups": 2, "ratio": shape.ratio, "dim": shape.dim, "dtype": shape.dtype}
        batch = make_batch(counts, pasts, window=window, scattered=True, device="cuda", **options)
        features = {"window": window, "softcap": shape.softcap}
        check(batch, **{name: value for name, value in features.items() if value is not None})


def decode() -> None:
    attention(test_decode.check, [1] * 5, [700, -1, 0, 15, 129])
    attention(test_decode.check, [3, 1, 5], [300, 0, 64])


def decode_row() -> None:
    for past in (-1, 0, 700):
        attention(test_decode.check, [1], [past])
        for kv_dtype in KV_DTYPES:
            batch = make_batch([1], [past], page=16, groups=2, ratio=4, dim=128, dtype=BF16, scattered=True, device="cuda")
            test_decode.check(in_eight_bits(batch, kv_dtype))


def short_row() -> None:
    for past in (-1, 0, 700):
        options = {"page": 16, "dim": 80, "ratio": 3, "rotary": 32, "dtype": BF16, "device": "cuda"}
        test_short_row.check(past, norm=True, **options)
        test_short_row.check(past, window=40, **options)
    test_short_row.check(40, -1, 0, 97, page=16, ratio=4, dim=128, dtype=BF16, norm=True, device="cuda")


def new_token() -> None:
    for past in (-1, 0, 700):
        test_new_token.check(past, page=16, ratio=4, dim=128, dtype=BF16, norm=True, device="cuda")
        test_new_token.check(past, page=16, ratio=3, dim=80, dtype=BF16, rotary=32, window=40, device="cuda")


def rope_tables() -> None:
    test_rope_tables.check(3, 40, BF16, last=1_000_000, device="cuda")


def batch_invariant() -> None:
    attention(test_decode.check_invariance, [1] * 4, [700, 1, 40, 129])


def prefill() -> None:
    attention(test_prefill.check, [70, 0, 1, 130], [0, 5, 64, 33])


def gluon() -> None:
    attention(test_hopper.check, [70, 0, 1, 130], [0, 5, 64, 33], SHAPES[:1])


def shared_prefix() -> None:
    for dtype in (BF16, FP32):
        options = {"page": 16, "ratio": 4, "dim": 64, "dtype": dtype, "device": "cuda"}
        test_shared_prefix.check([(400, [3, 20, None, 1]), (0, [5, None]), (48, [300])], **options)


def append() -> None:
    for tokens in (1, 5, 300):
        test_append.check(tokens, device="cuda")
        test_append.check(tokens, norm=True, fused=True, rotary=32, skipped=1, heads_first=True, device="cuda")


def products() -> None:
    sums = SplitSums(torch.device("cuda"))
    for tokens in (1, 2, 17, 64):
        test_matvec.check(tokens, 1000, (1001, 63, 1), bias=True, sums=sums, device="cuda")
        test_matvec.check(tokens, 896, (250, 250), FP16, gated=True, sums=sums, device="cuda")
        test_lora.check(tokens, 1000, (1001, 63, 1), (16, 0, 100), bias=True, sums=sums, device="cuda")
        test_lora.check(tokens, 896, (250, 250), (8, 8), gated=True, sums=sums, device="cuda")
        numbers = [number % 3 - 1 for number in range(tokens)]
        test_lora.check_stacked(tokens, 1000, (1001, 63, 1), ((4, 9), (0, 0), (100, 0)), numbers, sums=sums, device="cuda")
        test_matvec.check(tokens, 4864, (130,), residual=True, strided=True, sums=sums, device="cuda")
    test_one_wave.check(1000, [1001, 63, 1], bias=True, norm=True, device="cuda")
    test_one_wave.check(896, [250, 250], FP16, gated=True, norm=True, device="cuda")
    test_one_wave.check(3072, [130], residual=True, device="cuda")
    for tokens in (3, 11):
        test_few_rows.check(tokens, 1024, [1001, 63, 1], bias=True, norm=True, device="cuda")
        test_few_rows.check(tokens, 896, [250, 250], FP16, gated=True, wide=8, device="cuda")
        test_few_rows.check(tokens, 3072, [130], residual=True, wide=24, device="cuda")


def between() -> None:
    for tokens in (1, 7):
        test_activation.check(tokens, 333, device="cuda")
        test_norm.check(tokens, 1152, unit_offset=True, strided=True, device="cuda")
    test_merge.check(test_merge.states(17, 3, 80, dtype=BF16, device="cuda"))
    test_work_list.check([300, 0, 129, 1], 8, 4, 128, "cuda")


def sampling() -> None:
    for params in test_sampling.FILTERS:
        test_sampling.check_kept(test_sampling.logits(3, 9001, BF16, "cuda"), params)
    test_sampling.check_kept(test_sampling.adversarial(5003, FP32, "cuda")[:-1], test_sampling.FILTERS[7])
    test_greedy.check_greedy(test_sampling.logits(3, 9001, BF16, "cuda"))
    test_sampling_penalty.check(3, 9001, BF16, "cuda", 1.3, 5, 9)
    for x in (test_typical.filtered(2, 9001, "cuda"), test_typical.scores(2, 9001, "cuda")):
        test_typical.check(x, 0.9)
    test_logprobs.check_likeliest(test_sampling.logits(3, 9001, BF16, "cuda"))
    test_logprobs.check_draws(test_sampling.logits(5, 9001, FP32, "cuda"))


def advance() -> None:
    for rows, windows in ((1, 1), (33, 2)):
        test_advance.check(rows, windows, 4, drop=True, seen=True, device="cuda")


def linear() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        test_delta_step.check((2, 2, 128, 128), dtype, "cuda", lengths=[5, 7, 8, 100], columns=32)
        test_delta_step.check((2, 2, 8, 16), dtype, "cuda")
        test_delta_prefill.check([3, 65, 1], dtype, "cuda", shape=(2, 2, 128, 128), goes_on=True)


RUNS = (
    decode, decode_row, short_row, new_token, rope_tables, batch_invariant, prefill, gluon, shared_prefix, append, products,
    between, linear, sampling, advance,
)  # fmt: skip


def chosen(names: list[str]) -> Iterator[Callable[[], None]]:
    known = {run.__name__: run for run in RUNS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no such run: {', '.join(unknown)}; there are {', '.join(known)}")
    yield from (known[name] for name in names or known)


if __name__ == "__main__":
    for run in chosen(sys.argv[1:]):
        run()
        torch.cuda.synchronize()
        print(f"{run.__name__}: results are right", flush=True)
