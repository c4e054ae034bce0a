"""What the patched model finds again in a long context, beside stock: needles, pairs to look up, chains of variables.

    python -m hf_fastattn.eval.recall --model <hub id or path> --lengths 1024 8192 --output results

What is asked for stands at several depths of contexts of several lengths. The context is computed first, and the question
and the greedy answer go on from its pages, as a chat's next turn does. The shipped checkpoint was trained for these tasks;
any other model is asked in the same words. Exits with 1 if what is found differs from stock by more than chance, a context
was computed in another way than on pages, or, in fp32, answers that stock has right are wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import recall_summary
from hf_fastattn.eval.accuracy.faults import planted
from hf_fastattn.eval.accuracy.feed import CallLog, new_cache
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.checkpoint.recall import RecallPrompt, recall_prompts
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.progress import bar
from hf_fastattn.transformers_version import CACHE

# Last tokens of a prompt that are appended to the pages of all others, the question among them.
ASKED = 8
CELLS = {"cpu": ((256, 768, 1536), (0.0, 0.5, 1.0), 6), "cuda": ((512, 1024, 2048, 3500), (0.0, 0.25, 0.5, 0.75, 1.0), 48)}
# Tokens of the prompts of one call.
BATCH_TOKENS = 2**16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if nothing alarms, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval recall")
    options = made.parse(argv)
    options.device = options.device or default_device()
    on_gpu = options.device.startswith("cuda")
    if options.dtype == "auto":
        options.dtype = "bfloat16" if on_gpu else "float32"
    lengths, depths, count = CELLS["cuda" if on_gpu else "cpu"]
    options.lengths, options.depths = options.lengths or list(lengths), options.depths or list(depths)
    options.count = options.count or count
    start = time.perf_counter()
    try:
        model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
        cells = run(model, tokenizer, options)
    except ValueError as error:
        made.error(str(error))
    record = {
        "evaluation": "recall",
        "command": command("hf_fastattn.eval.recall", argv),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("output", "quiet", "model")},
        "environment": environment(options.device),
        "seconds": round(time.perf_counter() - start, 1),
        **recall_summary.summarise(cells, options.dtype == "float32"),
    }
    report.write(
        options.output, "recall", recall_summary.markdown(record), record, lambda plt: recall_summary.draw(plt, record)
    )
    return 0 if record["verdict"] == "green" else 1


def run(model: Any, tokenizer: Any, options: Any) -> list[dict[str, Any]]:
    """Of each task, length and depth which prompts stock and patched answer right, and how many answers differ."""
    cells = [(task, length, depth) for task in options.tasks for length in options.lengths for depth in options.depths]
    prompts = {cell: recall_prompts(tokenizer, *cell, options.count, options.seed) for cell in cells}
    theirs = [answers(model, prompts[cell]) for cell in bar(cells, "stock", "cell", options.quiet)]
    found = []
    with hf_fastattn.patched(model), planted(model, options.inject):
        for cell, stock in zip(bar(cells, "patched", "cell", options.quiet), theirs, strict=True):
            calls = CallLog(model)
            ours = answers(model, prompts[cell])
            calls.look()
            wanted = [prompt.answer for prompt in prompts[cell]]
            found.append(
                {
                    **dict(zip(("task", "length", "depth"), cell, strict=True)),
                    "stock": [int(one == right) for one, right in zip(stock, wanted, strict=True)],
                    "ours": [int(one == right) for one, right in zip(ours, wanted, strict=True)],
                    "differ": sum(a != b for a, b in zip(stock, ours, strict=True)),
                    **calls.record(),
                }
            )
    return found


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
