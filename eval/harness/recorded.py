"""Requests of lm-evaluation-harness in a file: recorded where it and its tasks are, answered where its models are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS_FOLDER = Path(__file__).with_name("shipped_tasks")
# The tasks of the benchmark, whose examples are the same before each question, or drawn for each.
RECORDED = (
    "fastattn_next_line",
    "fastattn_next_line_drawn",
    "fastattn_pairs",
    "fastattn_pairs_drawn",
    "fastattn_continue",
)


def record(names: Sequence[str] = RECORDED, limit: int | None = None) -> list[dict[str, Any]]:
    """Of each task its name, the kind of its requests, and their arguments.

    Args:
        limit: documents of each task, at most.
    """
    # The harness takes seconds to import, and machines that only replay may lack what its tasks need.
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    found = []
    for name, task in manager.load(list(names))["tasks"].items():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        requests = [list(instance.args) for instance in task.instances]
        found.append({"task": name, "kind": task.instances[0].request_type, "requests": requests})
    return found


def save(path: Path, recorded: list[dict[str, Any]]) -> None:
    """Write what `record` gave."""
    path.write_text(json.dumps(recorded), encoding="utf-8")


def load(path: Path) -> list[dict[str, Any]]:
    """Read it again.

    Raises:
        ValueError: the file holds something else.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all({"task", "kind", "requests"} <= set(one) for one in found):
        raise ValueError(f"{str(path)!r} holds no requests; `hf-fastattn bench tasks --save FILE` writes such files")
    return found
