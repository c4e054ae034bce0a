"""What the patched model finds again in a long context, beside stock: needles, pairs to look up, chains of variables.

    python -m hf_fastattn.eval.recall --model <hub id or path> --lengths 1024 8192 --output results

What is asked for stands at several depths of contexts of several lengths. The context is computed first, and the question
and the greedy answer go on from its pages, as a chat's next turn does. The shipped checkpoint was trained for these tasks;
any other model is asked in the same words. Exits with 1 if what is found differs from stock by more than chance, a context
was computed in another way than on pages, or, in fp32, answers that stock has right are wrong.

With `--kv-dtype` the patched model is compared with stock over caches that round keys and values alike, and what rounding
loses, against stock as it is, may be at most one point.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.counters import CallCounters
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import recall_summary, variants
from hf_fastattn.eval.accuracy.faults import planted
from hf_fastattn.eval.accuracy.feed import CallLog, new_cache
from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.processes import measured, own_device
from hf_fastattn.eval.accuracy.rounded_caches import rounded_caches
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.checkpoint.recall import RecallPrompt, recall_prompts
from hf_fastattn.eval.choices import FORMAT_FAULTS
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.progress import counted
from hf_fastattn.patching import find_model
from hf_fastattn.transformers_version import CACHE

# Last tokens of a prompt that are appended to the pages of all others, the question among them.
ASKED = 8
CELLS = {"cpu": ((256, 768, 1536), (0.0, 0.5, 1.0), 6), "cuda": ((512, 1024, 2048, 3500), (0.0, 0.25, 0.5, 0.75, 1.0), 48)}
# Tokens of the prompts of one call.
BATCH_TOKENS = 2**16
# Of the counters of a cell's calls those that do not depend on the cells before it.
COUNTED = ("forwards", "fast_loops", "fallbacks", "not_looped", "backend")

Cell = tuple[str, int, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if nothing alarms, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval recall")
    options = made.parse(argv)
    options.device = own_device(options.device or default_device())
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    if options.dtype == "auto":
        options.dtype = "bfloat16" if on_gpu else "float32"
    lengths, depths, count = CELLS["cuda" if on_gpu else "cpu"]
    options.lengths, options.depths = options.lengths or list(lengths), options.depths or list(depths)
    options.count = options.count or count
    start = time.perf_counter()
    try:
        patch_options = _patch_options(options)
        model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
        cells = run(model, tokenizer, options, patch_options)
    except ValueError as error:
        made.error(str(error))
    unsaid = ("output", "quiet", "model", "threads")
    record = {
        "evaluation": "recall",
        "command": command("hf_fastattn.eval.recall", argv),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in unsaid},
        "environment": environment(options.device),
        "seconds": round(time.perf_counter() - start, 1),
        **recall_summary.summarise(cells, options.dtype == "float32"),
    }
    report.write(
        options.output, "recall", recall_summary.markdown(record), record, lambda plt: recall_summary.draw(plt, record)
    )
    return 0 if record["verdict"] == "green" else 1


def _patch_options(options: Any) -> dict[str, Any]:
    """What `hf_fastattn.patch` is given.

    Raises:
        ValueError: `--variant` is none, or says how to feed, which has no meaning here; or a fault has nothing to be in.
    """
    variant = variants.parse(options.variant)
    if variant.share or variant.loop:
        raise ValueError(f"argument --variant: {options.variant!r} has share or loop, which recall has no use for")
    given = {**dict(variant.options)} | ({} if options.kv_dtype is None else {"kv_dtype": options.kv_dtype})
    options.kv_dtype = given.get("kv_dtype")
    if options.inject in FORMAT_FAULTS and options.kv_dtype is None:
        raise ValueError(f"argument --inject: {options.inject} needs 8-bit keys and values; give --kv-dtype")
    return given


def run(model: Any, tokenizer: Any, options: Any, patch_options: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each task, length and depth which prompts stock and patched answer right, and how many answers differ."""
    cells: list[Cell] = [
        (task, length, depth) for task in options.tasks for length in options.lengths for depth in options.depths
    ]

    def prompts(cell: Cell) -> list[RecallPrompt]:
        return recall_prompts(tokenizer, *cell, options.count, options.seed)

    def stock(cell: Cell) -> dict[str, Any]:
        found = {"stock": answers(model, prompts(cell))}
        if options.kv_dtype is not None:
            with rounded_caches(options.kv_dtype):
                found["rounded"] = answers(model, prompts(cell))
        return found

    def patched(cell: Cell) -> dict[str, Any]:
        # Forwards outside of `generate()` count for the call before them: that of another cell.
        find_model(model)._fastattn.runtime.counters = CallCounters()
        calls, before = CallLog(model), fault.times
        found = answers(model, prompts(cell))
        calls.look()
        known = calls.record()
        return {"ours": found, "planted": fault.times - before, **{name: known[name] for name in COUNTED}}

    with counted(len(cells), "stock", "cell", options.quiet) as each:
        theirs = measured(cells, stock, Journal(None, {}), each)
    # Patched once, so that steps are recorded once.
    with hf_fastattn.patched(model, **patch_options), planted(model, options.inject) as fault:
        with counted(len(cells), "patched", "cell", options.quiet) as each:
            ours = measured(cells, patched, Journal(None, {}), each)
    return [_judged(cell, prompts(cell), {**a, **b}) for cell, a, b in zip(cells, theirs, ours, strict=True)]


def _judged(cell: Cell, prompts: Sequence[RecallPrompt], found: dict[str, Any]) -> dict[str, Any]:
    """Which answers are right, in place of the answers."""
    sides: dict[str, Any] = {side: found.pop(side) for side in ("stock", "rounded", "ours") if side in found}
    base = sides.get("rounded", sides["stock"])
    differ = sum(a != b for a, b in zip(base, sides["ours"], strict=True))
    right = {
        side: [int(one == prompt.answer) for one, prompt in zip(given, prompts, strict=True)]
        for side, given in sides.items()
    }
    return {**dict(zip(("task", "length", "depth"), cell, strict=True)), **right, "differ": differ, **found}


@torch.no_grad()
def answers(model: Any, prompts: Sequence[RecallPrompt]) -> list[list[int]]:
    """What the model, stock or patched, answers greedily to prompts of the same length."""
    length, new = len(prompts[0].prompt), len(prompts[0].answer)
    size, found = max(1, BATCH_TOKENS // length), list[list[int]]()
    for first in range(0, len(prompts), size):
        ids = torch.tensor([one.prompt for one in prompts[first : first + size]], device=model.device)
        mask, cache = torch.ones_like(ids), new_cache(model)
        try:
            before = length - ASKED
            model(ids[:, :before], attention_mask=mask[:, :before], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            out = model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
        finally:
            if isinstance(cache, PagedCache):
                cache.reset()
        found += out[:, length:].tolist()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
