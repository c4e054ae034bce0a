"""The device's loop against the exact model: log-probabilities of forced tokens, its own choices, and its draws.

Three calls of a patched model: the scored tokens of the windows are forced, and each step says how likely its token was
and what it would have taken; then rows go on greedily as users' do; then they draw. What the exact logits lose by a token
that was taken is its regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.draw_costs import draw_checks, draw_figures
from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, Clusters
from hf_fastattn.eval.accuracy.feed import CallLog, whole
from hf_fastattn.eval.accuracy.loop_feed import Scores, drawn, forced_scores
from hf_fastattn.eval.accuracy.parity_greedy import Path
from hf_fastattn.eval.accuracy.verdict import FLOOR_EPS, MAXIMUM_FACTOR, MEAN_SQUARE_FACTOR, Check
from hf_fastattn.eval.accuracy.windows import WindowBatch, joined_rows

# Draws: of this many of the likeliest tokens, after so much of a window, so many times.
TOP_K, CONTEXT, SAMPLES = 8, 48, 4


def window_logprobs(logits: Tensor, batch: WindowBatch) -> list[Tensor]:
    """Log-probabilities of each window's scored tokens, fp64, from logits `[B, K, V]` of the last K columns."""
    found = []
    for row, window in zip(logits, batch.windows, strict=True):
        likely = row[-window.scored - 1 : -1].double().log_softmax(-1)
        targets = torch.tensor(window.ids[-window.scored :], device=likely.device)[:, None]
        found.append(likely.gather(1, targets)[:, 0])
    return found


def logprob_errors(logprobs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[list[float]]:
    """Errors of log-probabilities, a list a window."""
    return [(ours.to(true) - true).tolist() for ours, true in zip(logprobs, exact, strict=True)]


@dataclass(frozen=True)
class LoopRun:
    """What the device's loop made of a batch: of forced tokens, its greedy tokens `[B, N]`, and rows with drawn ones."""

    scores: Scores
    tokens: Tensor
    draws: WindowBatch


def run_loop(calls: CallLog, batch: WindowBatch, new: int, share: bool, seed: int) -> LoopRun:
    """The three calls, of a patched model whose loop is exercised.

    Args:
        calls: of the model; looks after each of them.
        new: tokens of the greedy and of the drawn call.
        seed: of the draws.
    """
    model = calls.model
    scores = forced_scores(model, batch, share)
    calls.look()
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask.long(), max_new_tokens=new, do_sample=False)
    calls.look()
    samples = SAMPLES if share else 1
    draws = drawn(model, batch, CONTEXT, seed, max_new_tokens=new, top_k=TOP_K, num_return_sequences=samples)
    calls.look()
    return LoopRun(scores, out[:, ids.shape[1] :].cpu(), draws)


def joined(runs: Sequence[LoopRun]) -> LoopRun:
    """Runs over rows of one batch as a run over all of them."""
    scores = Scores(
        [row for run in runs for row in run.scores.logprobs], [row for run in runs for row in run.scores.choices]
    )
    return LoopRun(scores, torch.cat([run.tokens for run in runs]), joined_rows([run.draws for run in runs]))


def loop_figures(
    model: Any, batch: WindowBatch, run: LoopRun, exact: Tensor, path: Path, exact_path: Tensor
) -> dict[str, Any]:
    """Figures of a run, by the exact model.

    Args:
        model: not patched, in the wider dtype.
        exact: `[B, K, V]` exact logits of the last columns, one more than are scored.
        path: stock's greedy path, and `exact_path [B, N, V]` the exact logits along it.
    """
    regrets = []
    for row, window, choices in zip(exact, batch.windows, run.scores.choices, strict=True):
        regrets.append(_regret(row[-window.scored - 1 : -1], choices))
    new = run.tokens.shape[1]
    parted = int((run.tokens != path.tokens).any(1).sum())
    if parted:
        exact_path = _tail(model, WindowBatch((), *_longer(batch, run.tokens)), new)
    return {
        "errors": logprob_errors(run.scores.logprobs, window_logprobs(exact, batch)),
        "regret": max(regrets),
        "greedy_regret": _regret(exact_path, run.tokens),
        "parted": parted,
        "draws": draw_figures(_tail(model, run.draws, new), run.draws.ids[:, -new:], TOP_K),
    }


def _regret(exact: Tensor, tokens: Tensor) -> float:
    """What the exact logits `[.., V]` lose by `tokens [..]`, at most."""
    taken = exact.gather(-1, tokens[..., None].to(exact.device))[..., 0]
    return float((exact.amax(-1) - taken).max())


def _longer(batch: WindowBatch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((batch.ids, tokens), 1), torch.cat((batch.mask, torch.ones_like(tokens, dtype=torch.bool)), 1)


def _tail(model: Any, batch: WindowBatch, new: int) -> Tensor:
    """Logits `[B, new, V]` that the last `new` tokens were chosen by."""
    return whole(model, batch, new + 1)[:, :-1]


def parity_loop_checks(
    variant: str,
    parts: Sequence[dict[str, Any]],
    stock: Sequence[dict[str, Any]],
    clusters: Clusters,
    largest: float,
    size: float,
) -> list[Check]:
    """Checks of one variant.

    Args:
        parts: of each batch, as `loop_figures` gives them.
        stock: of each batch, errors of stock's log-probabilities, `pieces` and `one`.
        largest: by how much a logit may be off.
        size: rms of the exact log-probabilities, for the floor.
    """

    def windows(rows: Sequence[Any]) -> list[np.ndarray]:
        return [np.array(values, float) for batch in rows for values in batch]

    ours = windows([part["errors"] for part in parts])
    pieces, one = windows([part["pieces"] for part in stock]), windows([part["one"] for part in stock])
    null = clusters.ratio_of_squares(one, pieces).interval(ALARM_LEVEL)[1]
    rms = float(np.sqrt(np.mean(np.concatenate(pieces) ** 2)))
    floor = FLOOR_EPS * size
    limit = MEAN_SQUARE_FACTOR * max(1.0, null if np.isfinite(null) else 1.0) + (floor / max(rms, 1e-300)) ** 2
    most = MAXIMUM_FACTOR * max(float(np.abs(np.concatenate(way)).max()) for way in (pieces, one)) + floor
    values = np.abs(np.concatenate(ours))
    worst = float(values.max()) if np.isfinite(values).all() else float("nan")
    return [
        Check(
            variant, "loop, log-probabilities, mean square / stock's", clusters.ratio_of_squares(ours, pieces).value, limit
        ),
        Check(variant, "loop, log-probabilities, largest error", worst, most),
        Check(variant, "loop, largest regret of a choice", max(part["regret"] for part in parts), 2 * largest),
        Check(variant, "loop, largest regret of its own path", max(part["greedy_regret"] for part in parts), 2 * largest),
        *draw_checks(variant, [part["draws"] for part in parts], largest),
    ]
