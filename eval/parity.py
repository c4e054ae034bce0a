"""Logits and hidden states of the patched model against the exact ones, beside stock's own error.

    python -m hf_fastattn.eval.parity --model <hub id or path> --data wikitext --output results

Truth is stock Transformers in fp64 (for fp32 models) or fp32, in one forward. Stock in the model's dtype, in one
forward and in pieces, shows what rounding alone does; each variant of the patched model is fed in the same pieces
(prefill, appends, decode), and both then generate greedily. In the device's loop, where nobody sees logits, it is
log-probabilities of forced tokens, choices and draws that are held against the exact logits. Exits with 1 if a variant
alarms, and names the first layer and token that are wrong; the limits are derived in the report.

With `--kv-dtype` exact and stock run over caches that round keys and values as the patched model stores them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import options, parity_summary
from hf_fastattn.eval.accuracy.faults import planted
from hf_fastattn.eval.accuracy.feed import CallLog, in_pieces, whole
from hf_fastattn.eval.accuracy.layer_tap import LayerTap
from hf_fastattn.eval.accuracy.loop_feed import exercised
from hf_fastattn.eval.accuracy.options import Setup
from hf_fastattn.eval.accuracy.parity_errors import first_beyond, layer_errors, logit_errors
from hf_fastattn.eval.accuracy.parity_greedy import Path, greedy_path, path_errors
from hf_fastattn.eval.accuracy.parity_loop import joined, logprob_errors, loop_figures, run_loop, window_logprobs
from hf_fastattn.eval.accuracy.processes import measured
from hf_fastattn.eval.accuracy.rounded_caches import rounded_caches
from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.plots import draw_parity
from hf_fastattn.eval.reporting.progress import counted

ONE, STOCK = "stock, one forward", "stock"


class StockPart(NamedTuple):
    """What stock and the exact model make of one batch.

    Attributes:
        exact: logits `[B, keep, V]` of the exact model.
        exact_states: `[layers, B, S, hidden]`, likewise.
        series: the errors of stock in one forward and in pieces.
        likely: the errors of its log-probabilities, and the size of the exact ones.
        path: what stock generates greedily.
        exact_path: the exact logits that its tokens stand at.
        bounds: `[layers]` what a token may be off in a layer, by both of stock's ways.
    """

    exact: Tensor
    exact_states: Tensor
    series: dict[str, dict[str, Any]]
    likely: dict[str, Any]
    path: Path
    exact_path: Tensor
    bounds: Tensor


def measure_stock(setup: Setup, batch: WindowBatch, keep: int, new_tokens: int) -> StockPart:
    """The part of `measure_batch` that no variant and no fault reaches."""
    with _exact(setup):
        exact, exact_states = _at_once(setup, batch, keep)
    true = window_logprobs(exact, batch)
    with rounded_caches(setup.kv_dtype):
        logits, states = _at_once(setup, batch, keep)
        one = layer_errors(states, exact_states)
        series = {ONE: {**logit_errors(logits, exact, batch), **_by_window(one)}}
        likely = {"one": logprob_errors(window_logprobs(logits, batch), true), "size": [row.tolist() for row in true]}

        logits, states = _in_pieces(setup, batch, keep, share=False)
        stock = layer_errors(states, exact_states)
        series[STOCK] = {**logit_errors(logits, exact, batch), **_by_window(stock)}
        likely["pieces"] = logprob_errors(window_logprobs(logits, batch), true)
        path = greedy_path(setup.model, batch, new_tokens, share=False)
    exact_path = _exact_along(setup, path, new_tokens)
    series[STOCK]["greedy"] = path_errors(path, path, exact_path, exact_path)
    bounds = torch.maximum(one.amax((1, 2)), stock.amax((1, 2)))
    return StockPart(exact, exact_states, series, likely, path, exact_path, bounds)


def measure_batch(setup: Setup, batch: WindowBatch, new_tokens: int) -> dict[str, Any]:
    """The errors of every series on one batch, by window."""
    # One column more than is scored: the logits before a token are those that it was chosen by.
    model, keep = setup.model, min(max(window.scored for window in batch.windows) + 1, batch.ids.shape[1])
    wide = models.truth_dtype(setup.dtype)
    part = setup.stock_part(batch, lambda: measure_stock(setup, batch, keep, new_tokens))
    exact, exact_states, series, likely, path, exact_path, bounds = part._replace(series=dict(part.series))
    counters: dict[str, Any] = {}
    loops: dict[str, Any] = {}
    for variant in setup.variants:
        with hf_fastattn.patched(model, **dict(variant.options)), planted(model, setup.fault, setup.layer) as fault:
            calls = CallLog(model)
            if variant.loop:
                with exercised(model):
                    parts = batch.each_alone if variant.alone else [batch]
                    run = joined([run_loop(calls, part, new_tokens, variant.share, setup.seed) for part in parts])
            else:
                logits, states = _in_pieces(setup, batch, keep, variant.share)
                ours = greedy_path(model, batch, new_tokens, variant.share)
                calls.look()
            counters[variant.name] = {**calls.record(), "planted": fault.times}
        if variant.loop:
            with models.in_precision(model, wide):
                loops[variant.name] = loop_figures(model, batch, run, exact, path, exact_path)
            continue
        exact_ours = exact_path if ours.same_tokens(path) else _exact_along(setup, ours, new_tokens)
        errors = layer_errors(states, exact_states)
        found = {**logit_errors(logits, exact, batch), **_by_window(errors)}
        found["first"] = first_beyond(errors, bounds, batch)
        found["greedy"] = path_errors(ours, path, exact_ours, exact_path)
        series[variant.name] = found
    split, done = (setup.schedule.pieces(batch.ids.shape[1], batch.shortest)[i][1] for i in (0, -1))
    return {
        "series": series, "loops": loops, "logprobs": likely, "counters": counters, "split": split, "done": done
    }  # fmt: skip


@contextmanager
def _exact(setup: Setup) -> Iterator[None]:
    """Inside, the model is the exact one."""
    with models.in_precision(setup.model, models.truth_dtype(setup.dtype)), rounded_caches(setup.kv_dtype):
        yield


def _exact_along(setup: Setup, path: Path, new_tokens: int) -> Tensor:
    """The exact logits `[rows, N, V]` that the tokens of a path stand at."""
    with _exact(setup):
        return whole(setup.model, path.as_batch(), new_tokens + 1, setup.kv_dtype is not None)[:, :-1]


def _at_once(setup: Setup, batch: WindowBatch, keep: int) -> tuple[Tensor, Tensor]:
    """Logits `[B, keep, V]` and states `[layers, B, S, hidden]` of one forward."""
    with LayerTap(setup.model) as tap:
        logits = whole(setup.model, batch, keep, setup.kv_dtype is not None)
        return logits, tap.take(batch.mask)


def _in_pieces(setup: Setup, batch: WindowBatch, keep: int, share: bool) -> tuple[Tensor, Tensor]:
    """The same from forwards over a cache; decode by forwards too, where the hooks see it."""
    logits, states = [], []
    done = 0
    with LayerTap(setup.model) as tap:
        for piece in in_pieces(setup.model, batch, setup.schedule, keep=keep, share=share, generate=False):
            copies = 2 if share and done else 1
            mask = batch.mask[:, done : piece.last].repeat_interleave(copies, 0)
            states.append(tap.take(mask)[:, ::copies])
            logits.append(piece.logits)
            done = piece.last
    return torch.cat(logits, 1)[:, -keep:], torch.cat(states, 2)


def _by_window(errors: Tensor) -> dict[str, Any]:
    """Sums of squares and maxima `[layers][B]` of errors `[layers, B, S]`."""
    return {"layer_squares": errors.square().sum(2).tolist(), "layer_max": errors.amax(2).tolist()}


def run(setup: Setup, new_tokens: int) -> dict[str, Any]:
    """Measure what the journal lacks; returns the summary with its checks and verdict."""
    start = time.perf_counter()
    resumed = sum(str(index) in setup.journal for index in range(len(setup.batches)))
    with counted(len(setup.batches), "parity", "batch", setup.quiet) as each:
        records = measured(setup.batches, lambda batch: measure_batch(setup, batch, new_tokens), setup.journal, each)
    summary = parity_summary.summarise(records, setup.batches, setup.variants, setup.tokenizer)
    seconds = time.perf_counter() - start
    return {**setup.record, "seconds": round(seconds, 1), "batches_resumed": resumed, **summary}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if no variant alarms, else 1."""
    arguments, setup = options.set_up("parity", parser("eval parity"), argv)
    record = run(setup, arguments.new)
    text = parity_summary.markdown(record)
    report.write(setup.output, "parity", text, record, lambda plt: draw_parity(plt, record))
    return 0 if record["verdict"] == "green" else 1


if __name__ == "__main__":
    raise SystemExit(main())
