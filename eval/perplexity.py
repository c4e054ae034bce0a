"""Perplexity of stock Transformers and of the patched model on the same tokens, and whether they differ.

    python -m hf_fastattn.eval.perplexity --model <hub id or path> --data wikitext --output results

Every window is scored by the exact model (fp64 for fp32, else fp32; one forward), by stock in one forward, and in
pieces by stock and by each variant of the patched model: prefill, appends, decode in `generate()`. What a window costs
in nats is paired, token by token, so the difference is known far better than either perplexity. Exits with 1 if a
variant alarms; the limits are derived in the report.

With `--kv-dtype` exact and stock run over caches that round keys and values as the patched model stores them, so that
limits are as narrow as without; what rounding costs is the difference to stock as it is, a series of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import options, perplexity_summary
from hf_fastattn.eval.accuracy.faults import planted
from hf_fastattn.eval.accuracy.feed import CallLog, Piece, in_pieces, whole
from hf_fastattn.eval.accuracy.loop_feed import exercised, forced_scores
from hf_fastattn.eval.accuracy.options import Setup
from hf_fastattn.eval.accuracy.processes import measured
from hf_fastattn.eval.accuracy.rounded_caches import rounded_caches
from hf_fastattn.eval.accuracy.variants import Variant
from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.plots import draw_perplexity
from hf_fastattn.eval.reporting.progress import counted

EXACT, ONE, STOCK = "exact", "stock, one forward", "stock"


def token_losses(pieces: Iterator[Piece], batch: WindowBatch) -> list[list[float]]:
    """Nats of each scored token, a list a window, from logits that cover them."""
    losses = torch.full(batch.ids.shape, torch.nan, dtype=torch.float64)
    width = batch.ids.shape[1]
    for piece in pieces:
        last = min(piece.last, width - 1)
        targets = batch.ids[:, piece.first + 1 : last + 1].to(piece.logits.device)
        # Row by row: in fp64 a large vocabulary takes room.
        for row, logits in enumerate(piece.logits[:, : last - piece.first]):
            chosen = torch.log_softmax(logits.double(), -1).gather(1, targets[row, :, None])
            losses[row, piece.first + 1 : last + 1] = -chosen[:, 0].cpu()
    return [row[-window.scored :].tolist() for row, window in zip(losses, batch.windows, strict=True)]


def stock_losses(setup: Setup, batch: WindowBatch, keep: int) -> dict[str, list[list[float]]]:
    """The series of one batch that are stock's, from logits of the last `keep` columns."""

    def at_once() -> Iterator[Piece]:
        width = batch.ids.shape[1]
        yield Piece("whole", width - keep, width, whole(setup.model, batch, keep, setup.kv_dtype is not None))

    with rounded_caches(setup.kv_dtype):
        with models.in_precision(setup.model, models.truth_dtype(setup.dtype)):
            series = {EXACT: token_losses(at_once(), batch)}
        series[ONE] = token_losses(at_once(), batch)
        series[STOCK] = token_losses(in_pieces(setup.model, batch, setup.schedule, keep=keep), batch)
    if setup.kv_dtype is not None:
        series[perplexity_summary.NOTHING_ROUNDED] = token_losses(
            in_pieces(setup.model, batch, setup.schedule, keep=keep), batch
        )
    return series


def score_batch(setup: Setup, batch: WindowBatch) -> dict[str, Any]:
    """All series of one batch: nats by window and token, the counters of each variant, and where phases begin."""
    keep = min(max(window.scored for window in batch.windows) + 1, batch.ids.shape[1])
    series = dict(setup.stock_part(batch, lambda: stock_losses(setup, batch, keep)))
    counters = {}
    for variant in setup.variants:
        losses, counters[variant.name] = score_patched(setup, batch, variant, keep)
        series[variant.name] = losses
    pieces = setup.schedule.pieces(batch.ids.shape[1], batch.shortest)
    width = batch.ids.shape[1]
    # A token's loss comes from the logits one column before it.
    phases = {"append": width - pieces[0][1] - 1, "decode": width - pieces[-1][1] - 1}
    return {"series": series, "counters": counters, "phases": phases}


def score_patched(setup: Setup, batch: WindowBatch, variant: Variant, keep: int) -> tuple[list[list[float]], dict[str, Any]]:
    """One variant on one batch, with the fault if one is asked for."""
    with hf_fastattn.patched(setup.model, **dict(variant.options)), planted(setup.model, setup.fault, setup.layer) as fault:
        calls = CallLog(setup.model)
        if variant.loop:
            losses = []
            for part in batch.each_alone if variant.alone else [batch]:
                with exercised(setup.model):
                    scores = forced_scores(setup.model, part, variant.share)
                calls.look()
                losses += [(-logprobs.double()).tolist() for logprobs in scores.logprobs]
        else:
            pieces = in_pieces(setup.model, batch, setup.schedule, keep=keep, share=variant.share)
            losses = token_losses(calls.watch(pieces), batch)
        return losses, {**calls.record(), "planted": fault.times}


def run(setup: Setup) -> dict[str, Any]:
    """Score what the journal lacks; returns the summary with its checks and verdict."""
    start = time.perf_counter()
    resumed = sum(str(index) in setup.journal for index in range(len(setup.batches)))
    with counted(len(setup.batches), "perplexity", "batch", setup.quiet) as each:
        records = measured(setup.batches, lambda batch: score_batch(setup, batch), setup.journal, each)
    summary = perplexity_summary.summarise(records, setup.documents, setup.variants)
    seconds = time.perf_counter() - start
    return {**setup.record, "seconds": round(seconds, 1), "batches_resumed": resumed, **summary}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if no variant alarms, else 1."""
    _, setup = options.set_up("perplexity", parser("eval perplexity"), argv)
    record = run(setup)
    text = perplexity_summary.markdown(record)
    report.write(setup.output, "perplexity", text, record, lambda plt: draw_perplexity(plt, record))
    return 0 if record["verdict"] == "green" else 1


if __name__ == "__main__":
    raise SystemExit(main())
