"""Stock Transformers and the patched model, side by side on one checkpoint.

    python -m hf_fastattn.eval.demo [hub id or path] [--dtype float32] ...

First one prompt, greedy: the text, whether the tokens agree, first-token time and tokens/s of both. Then several
samples of one long prompt, where the patched model computes the prompt once. Timed runs are interleaved (stock,
patched, stock, ...) after a warm-up of each, and medians are shown.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

import hf_fastattn
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.checkpoint.recall import heldout_documents
from hf_fastattn.eval.models import named
from hf_fastattn.eval.reporting.environment import default_device

SLOW_SECONDS = 10.0


@dataclass(frozen=True)
class Run:
    """One timed generate() call."""

    tokens: torch.Tensor  # [samples, T] prompt and new tokens
    prompt_length: int
    first_token: float  # seconds until the first new token was chosen
    total: float  # seconds

    @property
    def new_tokens(self) -> torch.Tensor:
        return self.tokens[:, self.prompt_length :]

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token, over all samples; 0 if only one token was generated."""
        samples, steps = self.new_tokens.shape
        return samples * (steps - 1) / (self.total - self.first_token) if steps > 1 else 0.0


class FirstTokenClock(StoppingCriteria):
    """Notes when generate() first asks whether to stop, which is once the first token is chosen. Never stops."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = now(input_ids.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Time in seconds once all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_generate(model: Any, prompt: torch.Tensor, seed: int, **options: Any) -> Run:
    """Generates from `prompt` ([1, T]) and times it; sampling starts from `seed`."""
    torch.manual_seed(seed)
    clock = FirstTokenClock()
    start = now(prompt.device)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    end = now(prompt.device)
    first = end if clock.first is None else clock.first
    return Run(tokens, prompt.shape[1], first - start, end - start)


def compare(stock: Any, patched: Any, prompt: torch.Tensor, repeats: int, **options: Any) -> dict[str, list[Run]]:
    """Interleaved runs of both models, after a warm-up of each that is not kept; if that is slow, one repeat does."""
    runs: dict[str, list[Run]] = {"stock": [], "patched": []}
    models = {"stock": stock, "patched": patched}
    for name, model in models.items():
        progress(f"warm-up, {name}")
        warm_up = timed_generate(model, prompt, seed=0, **options)
        if warm_up.total > SLOW_SECONDS:
            repeats = 1
    for repeat, (name, model) in itertools.product(range(repeats), models.items()):
        progress(f"run {repeat + 1} of {repeats}, {name}")
        runs[name].append(timed_generate(model, prompt, seed=0, **options))
    progress("")
    return runs


def progress(message: str) -> None:
    """Shows what is under way on one line that the next message overwrites; an empty message clears it."""
    line = f"   {message} ..." if message else ""
    print(f"\r{line:<60}", end="" if message else "\r", file=sys.stderr, flush=True)


def share_weights(model: Any) -> Any:
    """A second model with the same weight tensors, so that stock and patched can take turns without a second load."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


def agreement(runs: dict[str, list[Run]]) -> tuple[bool, str]:
    """Whether both generated the same tokens, and a sentence that says so."""
    stock, patched = runs["stock"][0].new_tokens, runs["patched"][0].new_tokens
    if torch.equal(stock, patched):
        return True, f"all {stock.numel()} tokens agree"
    steps = min(stock.shape[1], patched.shape[1])
    differing = (stock[:, :steps] != patched[:, :steps]).any(dim=0).nonzero().flatten().tolist()
    return False, f"tokens DIFFER, first at new token {differing[0] + 1 if differing else steps + 1}"


def print_timings(runs: dict[str, list[Run]]) -> None:
    print(f"\n   {'':<10}{'first token':>14}{'tokens/s':>12}")
    for name, repeats in runs.items():
        first = statistics.median(run.first_token for run in repeats) * 1e3
        rate = statistics.median(run.tokens_per_second for run in repeats)
        print(f"   {name:<10}{first:>11.1f} ms{rate:>12.1f}")
    print(f"   (median of {len(runs['stock'])}, interleaved)")


def print_text(tokenizer: Any, tokens: torch.Tensor, lines: int, label: str = "") -> None:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    shown = [line if len(line) <= 100 else f"{line[:96]} ..." for line in text.splitlines()]
    if len(shown) > lines:
        shown = [*shown[:lines], "..."]
    print(textwrap.indent("\n".join(shown), f"   {label}| ", lambda line: True))


def show_greedy(stock: Any, patched: Any, tokenizer: Any, prompt: torch.Tensor, options: argparse.Namespace) -> bool:
    """One prompt, greedy. Returns whether the tokens agree."""
    print(f"\n1. One prompt of {prompt.shape[1]} tokens, {options.new_tokens} new tokens, greedy\n")
    settings = generation_settings(tokenizer, options.new_tokens, do_sample=False)
    runs = compare(stock, patched, prompt, options.repeats, **settings)
    agree, sentence = agreement(runs)
    print_text(tokenizer, runs["patched"][0].tokens[0], lines=30)
    print_timings(runs)
    print(f"   {sentence}")
    if not agree:
        print("   stock generated:")
        print_text(tokenizer, runs["stock"][0].new_tokens[0], lines=30)
    return agree


def show_samples(stock: Any, patched: Any, tokenizer: Any, prompt: torch.Tensor, options: argparse.Namespace) -> None:
    """Several samples of one prompt, with the counters that say what the patched model computed."""
    print(
        f"\n2. {options.samples} samples of one prompt of {prompt.shape[1]} tokens, "
        f"{options.sample_tokens} new tokens each\n"
    )
    settings = generation_settings(tokenizer, options.sample_tokens, do_sample=True)
    runs = compare(stock, patched, prompt, options.repeats, num_return_sequences=options.samples, **settings)
    for index, tokens in enumerate(runs["patched"][0].new_tokens):
        print_text(tokenizer, tokens, lines=3, label=f"{index + 1} ")
    print_timings(runs)
    print(f"   {agreement(runs)[1]} (same seed)")
    call = hf_fastattn.report(patched).last_call
    assert call is not None  # the model is patched
    fallbacks = ", ".join(f"{reason} x {count}" for reason, count in call.fallbacks.items()) or "none"
    print(
        f"   last patched call: {call.prompt_tokens} prompt tokens computed, {call.forwards} forwards, "
        f"fallbacks: {fallbacks}\n"
        f"   pages: {call.pages_allocated} allocated, {call.pages_shared} shared, {call.pages_copied} copied"
    )


def generation_settings(tokenizer: Any, new_tokens: int, do_sample: bool) -> dict[str, Any]:
    """Arguments of generate() that do not depend on what a checkpoint's generation config says about sampling."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    warping = (
        {"temperature": 0.8, "top_p": 0.95, "top_k": 0} if do_sample else dict.fromkeys(("temperature", "top_p", "top_k"))
    )
    return {"max_new_tokens": new_tokens, "do_sample": do_sample, "num_beams": 1, "pad_token_id": pad or 0, **warping}


def long_prompt(tokenizer: Any, length: int) -> torch.Tensor:
    """The first `length` tokens of held-out prose: the opening of Mansfield Park (Austen, 1814)."""
    text = next(document["text"] for document in heldout_documents() if document["source"] == "austen-mansfield-park/0")
    # A token is rarely longer than eight characters; more text than needed would only draw a length warning.
    return tokenizer(text[: 8 * length], return_tensors="pt").input_ids[:, :length]


def load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model, in eval mode on `device`, and its tokenizer."""
    print(f"loading {name} ...", flush=True)
    with named(name, argument="model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


def print_set_up(model: Any) -> None:
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    print(f"{model.config.model_type}, {size:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}")
    report = hf_fastattn.report(model)
    print(f"patched: {len(report.modules)} modules, backend {report.backend} ({report.backend_reason})")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parser("demo").parse(argv)
    options.device = options.device or default_device()
    if options.dtype == "auto":
        options.dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 1 if greedy tokens differ in float32, where they must not."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        model, tokenizer = load(options.model, options.dtype, options.device)
    except ValueError as error:
        parser("demo").error(str(error))
    stock, patched = share_weights(model), model
    try:
        hf_fastattn.patch(patched)
    except ValueError as error:
        raise SystemExit(f"cannot patch {options.model}: {error}") from error
    print_set_up(patched)

    prompt = tokenizer(options.prompt, return_tensors="pt").input_ids.to(options.device)
    agree = show_greedy(stock, patched, tokenizer, prompt, options)

    room = model.config.get_text_config().max_position_embeddings - options.sample_tokens
    prompt = long_prompt(tokenizer, max(1, min(options.prompt_tokens, room))).to(options.device)
    show_samples(stock, patched, tokenizer, prompt, options)
    return 0 if agree or options.dtype != "float32" else 1


if __name__ == "__main__":
    raise SystemExit(main())
