"""Stock Transformers against the patched model: interleaved pairs of `generate()` calls in one process.

    python -m hf_fastattn.eval.speed --model <hub id or path> --batch 1 8 --prompt 512 --new 64 --pairs 9

Each pair runs both in turn, the order alternating, so that a drift of the machine's speed cancels in the ratio; the
median ratio is what counts. A case where the two disagree (see `agreement.py`) prints no ratio. Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_fastattn
from hf_fastattn.eval import report
from hf_fastattn.eval.agreement import Agreement
from hf_fastattn.eval.environment import environment
from hf_fastattn.eval.models import SHIPPED
from hf_fastattn.eval.shapes import SHAPES, random_model


@dataclass(frozen=True)
class Timing:
    """One call: seconds to the first token, and seconds a token after it."""

    first: float
    per_token: float


@dataclass(frozen=True)
class Case:
    """One row of the table; times are medians in milliseconds, ratios medians of patched over stock."""

    batch: int
    samples: int
    prompt: int
    new: int
    equal: bool
    stock_first_ms: float
    ours_first_ms: float
    stock_token_ms: float
    ours_token_ms: float
    first_ratio: float | None
    token_ratio: float | None
    forwards: int
    prompt_tokens: int
    fallbacks: dict[str, int]


class Clock:
    """A logits processor that notes when each token's logits arrive."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def timed(model: Any, ids: torch.Tensor, samples: int, new: int) -> Timing:
    """Time one `generate()` of `new` tokens; `samples` > 1 draws that many of each prompt."""
    clock = Clock()
    arguments: dict[str, Any] = {"num_return_sequences": samples, "do_sample": True} if samples > 1 else {"do_sample": False}
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, logits_processor=[clock], **arguments)
    start, first, *rest = clock.times
    return Timing(first - start, (rest[-1] - first) / len(rest))


def measure(
    model: Any, agrees: Agreement, ids: torch.Tensor, samples: int, new: int, pairs: int, say: Callable[[str], None]
) -> Case:
    """Time `pairs` pairs of one case, after a check that both compute the same."""
    equal = agrees(ids)
    stock: list[Timing] = []
    ours: list[Timing] = []
    for number in range(pairs + 1):
        for is_patched in (True, False) if number % 2 else (False, True):
            if is_patched:
                hf_fastattn.patch(model)
                timing = timed(model, ids, samples, new)
                call = hf_fastattn.report(model).last_call
                hf_fastattn.unpatch(model)
            else:
                timing = timed(model, ids, samples, new)
            # The first pair warms up.
            if number:
                (ours if is_patched else stock).append(timing)
        say(f"  batch {ids.shape[0]}, samples {samples}: pair {number} of {pairs}")
    assert call is not None
    return Case(
        ids.shape[0],
        samples,
        ids.shape[1],
        new,
        equal,
        1e3 * statistics.median(timing.first for timing in stock),
        1e3 * statistics.median(timing.first for timing in ours),
        1e3 * statistics.median(timing.per_token for timing in stock),
        1e3 * statistics.median(timing.per_token for timing in ours),
        statistics.median(b.first / a.first for a, b in zip(stock, ours, strict=True)) if equal else None,
        statistics.median(b.per_token / a.per_token for a, b in zip(stock, ours, strict=True)) if equal else None,
        call.forwards,
        call.prompt_tokens,
        dict(call.fallbacks),
    )


def first_token_of_samples(model: Any, ids: torch.Tensor, samples: int, pairs: int) -> float:
    """Median ratio of the patched model's first-token time with `samples` samples to that with one."""
    with hf_fastattn.patched(model):
        ratios = []
        for number in range(pairs + 1):
            order = (1, samples) if number % 2 else (samples, 1)
            first = {count: timed(model, ids, count, 2).first for count in order}
            if number:
                ratios.append(first[samples] / first[1])
    return statistics.median(ratios)


def table(cases: list[Case]) -> str:
    """The cases as a Markdown table."""
    head = "| batch x samples | prompt | new | first token, stock | patched | ratio | a token, stock | patched | ratio |"
    rows = [head, "|" + "---|" * 9]
    for c in cases:
        ratio = [f"{r:.2f}" if r is not None else "they disagree" for r in (c.first_ratio, c.token_ratio)]
        rows.append(
            f"| {c.batch} x {c.samples} | {c.prompt} | {c.new} | {c.stock_first_ms:.1f} ms | {c.ours_first_ms:.1f} ms "
            f"| {ratio[0]} | {c.stock_token_ms:.2f} ms | {c.ours_token_ms:.2f} ms | {ratio[1]} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if the two disagreed somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="hub id or path (default: the shipped checkpoint)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a model of this shape with random weights instead")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--samples", type=int, default=8, help="samples of one prompt of 1,000 tokens; 1 leaves it out")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder for speed.md and speed.json")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if options.shape:
        model = random_model(options.shape, device, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def prompts(rows: int, length: int) -> torch.Tensor:
        return torch.randint(vocabulary // 8, vocabulary, (rows, length), device=device)

    def say(line: str) -> None:
        print(line, flush=True)

    agrees = Agreement(model)
    cases = [measure(model, agrees, prompts(b, options.prompt), 1, options.new, options.pairs, say) for b in options.batch]
    ratio = None
    if options.samples > 1:
        prompt = prompts(1, 1000)
        cases.append(measure(model, agrees, prompt, options.samples, options.new, options.pairs, say))
        ratio = first_token_of_samples(model, prompt, options.samples, options.pairs)
    lines = [table(cases)]
    if ratio is not None:
        lines.append(f"\nFirst token of {options.samples} samples over that of one, patched: {ratio:.2f}")
    where = {**environment(device), "dtype": str(dtype), "pairs": options.pairs}
    lines.append(f"\n{where}")
    record = {"cases": [asdict(case) for case in cases], "samples_first_ratio": ratio, "environment": where}
    report.write(options.output, "speed", "\n".join(lines), record, None)
    print(json.dumps(record))
    return 0 if all(case.equal for case in cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
