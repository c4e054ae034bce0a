"""Generation without end: what forgetting costs, and whether time and memory stay flat.

    python -m hf_fastattn.eval.streaming --tokens 100000 --output results

The held-out text is one stream. Streaming (sinks and a window) and plain windowing (no sinks) score it token by token; at
places drawn from it, stock Transformers encodes the same tokens again, those that streaming sees, which is what a cache
without end is to be as good as (Xiao et al., 2023, "StreamingLLM"). Then tokens are generated, and what each takes is noted.
Exits with 1 if streaming's perplexity at these places is more than 3% above that.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn import PagedCache, Streaming
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy.estimates import student_t
from hf_fastattn.eval.accuracy.texts import documents
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.progress import bar
from hf_fastattn.eval.reporting.streaming_plot import draw_streaming
from hf_fastattn.stream_layout import StreamLayout
from hf_fastattn.transformers_version import CACHE

STREAMING, WINDOWING, AGAIN = "streaming", "plain windowing", "encoded again"
# Streaming may have this much more perplexity than the same tokens encoded again.
LIMIT = 1.03
# Tokens that are given at a time, and those that a point of the picture stands for.
FED, POINT = 1024, 2000
# Stretches of the generated tokens whose means are compared.
STRETCHES = 50
PAGE = 16


def stream_of(options: Any, tokenizer: Any) -> Tensor:
    """`[S]` tokens of all documents, one after the other, each after a bos if there is one."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found: list[int] = []
    for document in documents(options.data):
        found += [*head, *tokenizer.encode(document.text, add_special_tokens=False, verbose=False)]
        if len(found) >= options.tokens:
            break
    return torch.tensor(found[: options.tokens])


@torch.no_grad()
def streamed_losses(model: Any, tokens: Tensor, streaming: Streaming, quiet: bool, name: str) -> np.ndarray:
    """Nats `[S - 1]` of all tokens but the first."""
    losses = []
    with hf_fastattn.patched(model, streaming=streaming, page_size=PAGE):
        cache = PagedCache(model.config)
        for first in bar(range(0, len(tokens) - 1, FED), name, "piece", quiet):
            last = min(first + FED, len(tokens) - 1)
            given = tokens[first : last + 1].to(model.device)
            logits = model(given[None, :-1], **{CACHE: cache}).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, given[1:], reduction="none").double().cpu())
        fallbacks = dict(model._fastattn.runtime.counters.fallbacks)
    if fallbacks:
        raise RuntimeError(f"forwards left the pages: {fallbacks}")
    return torch.cat(losses).numpy()


@torch.no_grad()
def losses_encoded_again(
    model: Any, tokens: Tensor, layout: StreamLayout, places: Sequence[int], batch: int, quiet: bool
) -> np.ndarray:
    """Nats of the tokens behind `places`, by stock Transformers from the tokens that streaming sees there."""
    losses = []
    for first in bar(range(0, len(places), batch), AGAIN, "batch", quiet):
        rows = []
        for place in places[first : first + batch]:
            sinks, recent = layout.kept(place)
            rows.append(torch.cat((tokens[:sinks], tokens[recent : place + 1])))
        longest = max(map(len, rows))
        # Padded behind: what follows a token changes nothing for it.
        ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]).to(model.device)
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        logits = model.lm_head(hidden[torch.arange(len(rows), device=model.device), ends]).float()
        wanted = tokens[[place + 1 for place in places[first : first + batch]]].to(model.device)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().cpu())
    return torch.cat(losses).numpy()


class Clock:
    """A streamer that notes when tokens come, and what memory is held then."""

    def __init__(self, model: Any) -> None:
        self._model, self.times = model, list[float]()
        self.pages, self.bytes = list[int](), list[int]()

    def put(self, value: Tensor) -> None:
        """Tokens of a step, or the prompt."""
        self.times.append(time.perf_counter())
        if len(self.times) % 64 == 2:
            self.pages.append(self._model._fastattn.runtime.groups.pages_in_use)
            on_gpu = self._model.device.type == "cuda"
            self.bytes.append(torch.cuda.memory_allocated() if on_gpu else self._model._fastattn.runtime.groups.nbytes)

    def end(self) -> None:
        """Nothing is left to do."""


def generated(model: Any, tokens: Tensor, streaming: Streaming, new: int) -> dict[str, Any]:
    """What `new` tokens after a prompt of `tokens` take: milliseconds a token and memory, from the beginning to the end."""
    with hf_fastattn.patched(model, streaming=streaming, page_size=PAGE):
        given = tokens[None].to(model.device)
        # Kernels are compiled, and steps recorded.
        model.generate(given, max_new_tokens=40, do_sample=False)
        clock = Clock(model)
        model.generate(given, max_new_tokens=new, do_sample=False, streamer=clock)
        calls = hf_fastattn.report(model).last_call
    assert calls is not None
    gaps = 1e3 * np.diff(np.array(clock.times[1:]))
    count = max(min(STRETCHES, len(gaps)), 1)
    parts = [float(part.mean()) for part in np.array_split(gaps[len(gaps) % count :], count)]
    half = max(count // 2, 1)
    return {
        "new": new, "ms_a_token": parts, "pages": clock.pages, "bytes": clock.bytes, "fast_loops": calls.fast_loops,
        "first_half": statistics.median(parts[:half]), "second_half": statistics.median(parts[-half:]),
        "fallbacks": dict(calls.fallbacks),
    }  # fmt: skip


def compared(name: str, losses: np.ndarray, again: np.ndarray) -> dict[str, Any]:
    """A series at the drawn places, beside the same tokens encoded again."""
    differences = losses - again
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = student_t(0.95, len(differences) - 1) * error
    middle = float(differences.mean())
    return {
        "series": name, "perplexity": math.exp(losses.mean()), "ratio": math.exp(middle),
        "interval": [math.exp(middle - half), math.exp(middle + half)],
    }  # fmt: skip


def run(options: Any) -> dict[str, Any]:
    """Score, generate, and sum up."""
    start, device = time.perf_counter(), options.device or default_device()
    auto = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    model, tokenizer = models.load(options.model, dtype, device)
    tokens = stream_of(options, tokenizer)
    streaming = Streaming(options.sinks, options.window, options.block)
    layout = streaming.layout(PAGE)
    # As many tokens as streaming sees, but the sinks are the oldest of the window.
    without = Streaming(0, options.window + layout.sinks * PAGE, layout.step)
    if options.new == 1:
        raise ValueError("--new 1: give 0 for none, or some to time")
    if len(tokens) < layout.capacity + 2:
        raise ValueError(f"{len(tokens)} tokens are no more than a row keeps ({layout.capacity}); use a smaller --window")
    drawn = np.random.default_rng(options.seed).choice(
        np.arange(layout.capacity, len(tokens) - 1), min(options.places, len(tokens) - 1 - layout.capacity), replace=False
    )
    places = sorted(int(place) for place in drawn)
    losses = {
        STREAMING: streamed_losses(model, tokens, streaming, options.quiet, STREAMING),
        WINDOWING: streamed_losses(model, tokens, without, options.quiet, WINDOWING),
    }
    again = losses_encoded_again(model, tokens, layout, places, options.batch, options.quiet)
    series = [compared(name, found[places], again) for name, found in losses.items()]
    made = generated(model, tokens[: layout.capacity + 100], streaming, options.new) if options.new else None
    record = {
        "command": command("hf_fastattn.eval.streaming", options.argv),
        "environment": environment(device),
        "model": "the shipped checkpoint" if options.model == str(models.SHIPPED) else options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "data": options.data,
        "tokens": len(tokens),
        "places": len(places),
        "sinks": layout.sinks * PAGE,
        "window": options.window,
        "block": layout.step,
        "capacity": layout.capacity,
        "perplexities": {name: math.exp(found.mean()) for name, found in losses.items()},
        "again": {"perplexity": math.exp(again.mean())},
        "series": series,
        "curves": {
            name: [float(np.exp(part.mean())) for part in np.array_split(found, max(len(found) // POINT, 1))]
            for name, found in losses.items()
        },
        "generated": made,
        "limit": LIMIT,
        "verdict": "green" if series[0]["ratio"] <= LIMIT else "red",
        "seconds": round(time.perf_counter() - start, 1),
    }
    return record


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    lines = [
        f"# Generation without end: {record['verdict']}", "",
        f"{record['model']}, {record['dtype']}, {record['data']}: a stream of {record['tokens']:,} tokens; "
        f"{record['sinks']} sinks and at least the last {record['window']:,} tokens, of which {record['block']} leave at a "
        f"time: a row keeps at most {record['capacity']:,}. At {record['places']} places the tokens that streaming sees "
        "were encoded again by stock Transformers.", "",
        "| | perplexity of all tokens | at these places | times that of encoding again (95%) |",
        "|---|---|---|---|",
        f"| encoded again | | {record['again']['perplexity']:.3f} | |",
    ]  # fmt: skip
    for row in record["series"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['series']} | {record['perplexities'][row['series']]:.3f} | {row['perplexity']:.3f} | "
            f"{row['ratio']:.4f} ({low:.4f} to {high:.4f}) |"
        )
    lines += ["", f"Streaming's limit is {record['limit']} times."]
    made = record["generated"]
    if made is not None:
        lines += [
            "", f"Then {made['new']:,} tokens were generated from a prompt longer than the cache: "
            f"{made['first_half']:.3f} ms a token in the first half, {made['second_half']:.3f} in the second "
            f"(medians of stretches); pages held: {sorted(set(made['pages']))}; memory "
            f"{min(made['bytes']) / 1e6:.1f} to {max(made['bytes']) / 1e6:.1f} MB; device loops: {made['fast_loops']}.",
        ]  # fmt: skip
    return "\n".join([*lines, "", report.environment_lines(record)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if streaming stays below its limit, else 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval streaming")
    options = made.parse(words)
    options.argv = words
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        record = run(options)
    except ValueError as error:
        made.error(str(error))
    report.write(options.output, "streaming", markdown(record), record, lambda plt: draw_streaming(plt, record))
    return 0 if record["verdict"] == "green" else 1


if __name__ == "__main__":
    raise SystemExit(main())
