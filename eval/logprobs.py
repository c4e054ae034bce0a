"""Log-probabilities that reinforcement learning divides by: what `generate()` says of its tokens against a later forward.

    python -m hf_fastattn.eval.logprobs --model <hub id or path> --output results

GRPO and its relatives weigh a token by the ratio of its probability in the trainer's forward to that at which it was
generated. With the same weights the ratio would be 1, but decode and forward compute in other shapes and round otherwise.
Stock samples a rollout of several answers to each prompt; every variant of the patched model scores the same tokens on the
path that its `generate()` takes, and the trainer's forward, stock's, scores them again. Exits with 1 if ours differs from
it by more than stock's own scores do allow, or draws what the exact model would not.

With `--kv-dtype` stock generates over a cache that rounds keys and values as the patched model stores them; the trainer's
forward has none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

import hf_fastattn
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import logprobs_summary, options
from hf_fastattn.eval.accuracy.bitwise import layers_apart
from hf_fastattn.eval.accuracy.draw_costs import draw_figures
from hf_fastattn.eval.accuracy.exact_products import exact_products
from hf_fastattn.eval.accuracy.faults import planted
from hf_fastattn.eval.accuracy.feed import CallLog, new_cache, whole
from hf_fastattn.eval.accuracy.loop_feed import drawn, exercised
from hf_fastattn.eval.accuracy.options import Setup
from hf_fastattn.eval.accuracy.processes import measured
from hf_fastattn.eval.accuracy.rounded_caches import rounded_caches
from hf_fastattn.eval.accuracy.variants import Variant
from hf_fastattn.eval.accuracy.windows import WindowBatch, joined_rows
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.plots import draw_logprobs
from hf_fastattn.eval.reporting.progress import counted
from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.transformers_version import CACHE

STOCK = "stock"


@torch.no_grad()
def generated_logprobs(model: Any, prompts: WindowBatch, rollout: WindowBatch, scores: bool) -> Tensor:
    """`[B * samples, new]` log-probabilities that `generate()` computes of a rollout's tokens as it generates them.

    Args:
        model: stock or patched.
        prompts: rows, of each of which the rollout has as many answers as there are to one.
        scores: from the logits that it returns, for which Transformers' own loop runs; else the device's loop computes them.
    """
    width, samples = prompts.ids.shape[1], len(rollout.ids) // len(prompts.ids)
    forced = ForcedTokens(rollout.ids[:, width:])
    ids, mask = (table.repeat_interleave(samples, 0).to(model.device) for table in (prompts.ids, prompts.mask.long()))
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=rollout.ids.shape[1] - width,
        do_sample=False,
        logits_processor=LogitsProcessorList([forced]),
        output_logits=scores,
        return_dict_in_generate=scores,
    )
    return _chosen(torch.stack(out.logits, 1), rollout) if scores else forced.logprobs.double()


@torch.no_grad()
def paged_logprobs(model: Any, rollout: WindowBatch, new: int) -> Tensor:
    """The same by one forward of the patched model over its own pages."""
    cache = new_cache(model)
    try:
        logits = model(
            rollout.ids.to(model.device),
            attention_mask=rollout.mask.long().to(model.device),
            position_ids=rollout.positions.to(model.device),
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=new + 1,
        ).logits
        return _chosen(logits[:, :-1], rollout)
    finally:
        cache.reset()


def _chosen(logits: Tensor, rollout: WindowBatch) -> Tensor:
    """Log-probabilities `[B, n]` of the last tokens by the logits `[B, n, V]` before them."""
    targets = rollout.ids[:, -logits.shape[1] :, None].to(logits.device)
    # As trainers do, in fp32 whatever the logits are in; row by row, since a large vocabulary takes room.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = [row.to(dtype).log_softmax(-1).gather(1, target) for row, target in zip(logits, targets, strict=True)]
    return torch.stack(found)[..., 0].double().cpu()


def forward_logprobs(model: Any, rollout: WindowBatch, new: int) -> Tensor:
    """The same by one forward without a cache, as a trainer computes them."""
    return _chosen(whole(model, rollout, new + 1)[:, :-1], rollout)


class StockPart(NamedTuple):
    """What stock makes of one batch: a rollout, and log-probabilities `[B * samples, new]` of its tokens.

    Attributes:
        rollout: prompts and what stock has drawn.
        later: by the trainer's forward.
        exact: by the exact model's.
        generated: by stock's `generate()`.
    """

    rollout: WindowBatch
    later: Tensor
    exact: Tensor
    generated: Tensor


def measure_stock(setup: Setup, batch: WindowBatch, new: int, sampling: dict[str, Any]) -> StockPart:
    """The part of `measure_batch` that no variant and no fault reaches."""
    model = setup.model
    rollout = drawn(model, batch, batch.ids.shape[1], setup.seed, **sampling)
    later = forward_logprobs(model, rollout, new)
    with models.in_precision(model, models.truth_dtype(setup.dtype)):
        exact = forward_logprobs(model, rollout, new)
    with rounded_caches(setup.kv_dtype):
        return StockPart(rollout, later, exact, generated_logprobs(model, batch, rollout, True))


def measure_batch(setup: Setup, batch: WindowBatch, new: int, samples: int, top_k: int) -> dict[str, Any]:
    """What each series says of one batch's rollout less what the trainer's forward says, `[prompts][samples * new]`."""
    model, sampling = setup.model, {"max_new_tokens": new, "top_k": top_k, "num_return_sequences": samples}
    part = setup.stock_part(batch, lambda: measure_stock(setup, batch, new, sampling))
    rollout, later, exact, generated = part

    def by_prompt(difference: Tensor) -> list[list[float]]:
        return difference.view(len(batch.ids), -1).tolist()

    series, size = {STOCK: by_prompt(generated - later)}, by_prompt(exact)
    counters: dict[str, Any] = {}
    draws: dict[str, Any] = {}
    remains: dict[str, Any] = {}
    for variant in setup.variants:
        with hf_fastattn.patched(model, **dict(variant.options)), planted(model, setup.fault, setup.layer) as fault:
            calls = CallLog(model)
            found, own = _scored(calls, variant, batch, rollout, sampling, setup.seed)
            counters[variant.name] = {**calls.record(), "planted": fault.times}
            if dict(variant.options).get("batch_invariant") and not variant.loop:
                remains[variant.name] = _remaining(model, batch, rollout, new)
        series[variant.name] = by_prompt(found - later)
        if own is not None:
            with models.in_precision(model, models.truth_dtype(setup.dtype)):
                draws[variant.name] = draw_figures(whole(model, own, new + 1)[:, :-1], own.ids[:, -new:], top_k)
    error = by_prompt(later - exact)
    return {"series": series, "size": size, "error": error, "counters": counters, "draws": draws, "remains": remains}


def _scored(
    calls: CallLog, variant: Variant, batch: WindowBatch, rollout: WindowBatch, sampling: dict[str, Any], seed: int
) -> tuple[Tensor, WindowBatch | None]:
    """The log-probabilities of one variant, and rows that its own loop has drawn, if it is the device's."""
    if not variant.loop:
        found = generated_logprobs(calls.model, batch, rollout, True)
        calls.look()
        return found, None
    with exercised(calls.model):
        if variant.alone:
            return _scored_alone(calls, batch, rollout, sampling, seed)
        found = generated_logprobs(calls.model, batch, rollout, False)
        calls.look()
        own = drawn(calls.model, batch, batch.ids.shape[1], seed + 1, **sampling)
        calls.look()
    return found, own


def _scored_alone(
    calls: CallLog, batch: WindowBatch, rollout: WindowBatch, sampling: dict[str, Any], seed: int
) -> tuple[Tensor, WindowBatch]:
    """The same of rows in calls of their own: all answers are scored, and one to each prompt is drawn."""
    prompts, answers = batch.each_alone, rollout.each_alone
    found, own = [], []
    for number, answer in enumerate(answers):
        found.append(generated_logprobs(calls.model, prompts[number * len(prompts) // len(answers)], answer, False))
        calls.look()
    for number, prompt in enumerate(prompts):
        width = batch.ids.shape[1]
        own.append(drawn(calls.model, prompt, width, seed + 1 + number, **{**sampling, "num_return_sequences": 1}))
        calls.look()
    return torch.cat(found), joined_rows(own)


def _remaining(model: Any, batch: WindowBatch, rollout: WindowBatch, new: int) -> dict[str, Any]:
    """Where a batch-invariant variant's differences come from: attention, by layer, and what is left without products.

    Both are between decode steps and a forward over our own pages, so that attention is ours on both sides.
    """
    whole_rows = WindowBatch((), rollout.ids, rollout.mask)

    def differences() -> Tensor:
        return generated_logprobs(model, batch, rollout, True) - paged_logprobs(model, whole_rows, new)

    with_products = differences()
    with exact_products(model):
        without = differences()
    return {
        "layers": layers_apart(model, batch),
        "squares": float(with_products.square().sum()),
        "without_products": float(without.square().sum()),
        "tokens": with_products.numel(),
    }


def run(setup: Setup, new: int, samples: int, top_k: int) -> dict[str, Any]:
    """Measure what the journal lacks; returns the summary with its checks and verdict."""
    start = time.perf_counter()
    resumed = sum(str(index) in setup.journal for index in range(len(setup.batches)))
    with counted(len(setup.batches), "logprobs", "batch", setup.quiet) as each:
        records = measured(
            setup.batches, lambda batch: measure_batch(setup, batch, new, samples, top_k), setup.journal, each
        )
    summary = logprobs_summary.summarise(records, setup.documents, setup.variants)
    seconds = time.perf_counter() - start
    return {**setup.record, "seconds": round(seconds, 1), "batches_resumed": resumed, **summary}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if no variant alarms, else 1."""
    arguments, setup = options.set_up("logprobs", parser("eval logprobs"), argv)
    record = run(setup, arguments.new, arguments.samples, arguments.top_k)
    text = logprobs_summary.markdown(record)
    report.write(setup.output, "logprobs", text, record, lambda plt: draw_logprobs(plt, record))
    return 0 if record["verdict"] == "green" else 1


if __name__ == "__main__":
    raise SystemExit(main())
