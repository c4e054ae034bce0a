"""Tasks of lm-evaluation-harness, scored by its own `HFLM` and by `FastLM` on the same weights, patched.

    python -m hf_fastattn.eval.tasks --model <hub id or path> --tasks hellaswag mmlu --output results

Without `--tasks` those that come with the project run, on its held-out text and on words to look up: they need no network.
Exits with 1 if scores or answers differ by more than rounding makes them, a request ran another way than ours, or more
tokens were computed than there are distinct ones.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

import hf_fastattn
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.processes import measured, own_device
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.harness import compare
from hf_fastattn.eval.harness.recorded import TASKS_FOLDER
from hf_fastattn.eval.harness_command import NOT_INSTALLED
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment

# Documents of each of the project's own tasks on a CPU.
FEW = 16
# Options that change no figure, or are said elsewhere.
UNSAID = ("output", "quiet", "model", "threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if all is green, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval tasks")
    options = made.parse(argv)
    options.device = own_device(options.device or default_device())
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.dtype == "auto":
        options.dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    start = time.perf_counter()
    try:
        found = run(options)
    except (ImportError, KeyError, ValueError, OSError) as error:
        made.error(NOT_INSTALLED if str(getattr(error, "name", "")).startswith("lm_eval") else str(error))
    record = {
        "evaluation": "tasks",
        "command": command("hf_fastattn.eval.tasks", argv),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in UNSAID},
        "environment": environment(options.device),
        "seconds": round(time.perf_counter() - start, 1),
        **found,
    }
    record["verdict"] = compare.verdict_of(record)
    report.write(options.output, "tasks", compare.markdown(record), record, lambda plt: compare.draw(plt, record))
    return 0 if record["verdict"] == "green" else 1


def run(options: Any) -> dict[str, Any]:
    """Both on every task; the model is patched only while ours is at work."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hf_fastattn.eval.harness.model import HFLM, FastLM
    from hf_fastattn.eval.harness.scorer import Counts

    if options.quiet:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        logging.getLogger("datasets").setLevel(logging.ERROR)
    exact = options.dtype == "float32"
    if options.tasks is None and options.limit is None and options.device == "cpu":
        options.limit = FEW
    model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    paths = [str(TASKS_FOLDER), *(options.include_path or ())]
    own = [f"fastattn_{name}" for name in ("next_line", "pairs", "needle", "text")]
    tasks = options.tasks or own
    # The harness reads thousands of files to know its own tasks.
    manager = TaskManager(include_path=paths, include_defaults=not set(tasks) <= set(own))

    def score(lm: Any, task: str) -> tuple[dict[str, Any], float]:
        start = time.perf_counter()
        # The harness keeps results in the first process of a machine alone. It has pip list all packages for each task,
        # which takes seconds; our records say what they were made with.
        environment = mock.patch("lm_eval.evaluator.add_env_info", lambda storage: None, create=True)
        with mock.patch.dict(os.environ, LOCAL_RANK="0"), environment:
            found = lm_eval.simple_evaluate(
                model=lm, tasks=[task], task_manager=manager, num_fewshot=options.num_fewshot, limit=options.limit,
                bootstrap_iters=1000, batch_size=options.batch,
            )  # fmt: skip
        return found, time.perf_counter() - start

    def measure(task: str) -> dict[str, Any]:
        theirs, took_theirs = score(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch), task)
        ours = FastLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
        try:
            found, took = score(ours, task)
            call = hf_fastattn.report(ours.model).last_call if ours.is_patched else None
        finally:
            hf_fastattn.unpatch(model)
        names = [name for name in found["results"] if name in found["samples"]]
        return {
            "tasks": [compare.compare(name, theirs, found, exact) for name in names],
            "seconds": {"stock": round(took_theirs, 2), "ours": round(took, 2)},
            "counts": vars(ours.counts),
            "stock_ways": dict(ours.stock_ways),
            "steps": 0 if call is None else call.batch_steps,
        }

    parts = measured(tasks, measure, Journal(None, {}))
    entries = [entry for part in parts for entry in part["tasks"]]
    counts, stock_ways = Counts(), Counter[str]()
    for part in parts:
        counts.add(Counts(**part["counts"]))
        stock_ways.update(part["stock_ways"])
    texts = any(entry["kind"] == "texts" for entry in entries)
    return {
        "tasks": entries,
        "task_seconds": {task: part["seconds"] for task, part in zip(tasks, parts, strict=True)},
        "counts": vars(counts),
        "stock_ways": dict(stock_ways),
        "path": compare.path_checks(vars(counts), stock_ways, sum(part["steps"] for part in parts), texts),
    }


if __name__ == "__main__":
    raise SystemExit(main())
