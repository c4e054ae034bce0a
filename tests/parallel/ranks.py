"""What runs in each of the processes that share a tiny model: generate() with the loop that is a GPU's otherwise."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_fastattn
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.reexecuted import reexecuted_loop

_models: dict[Any, Any] = {}


def load(path: str, **options: Any) -> Any:
    """The model in `path`, with this rank's shards of the weights."""
    key = (path, tuple(options.items()))
    if key not in _models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _models[key] = AutoModelForCausalLM.from_pretrained(path, **{"tp_plan": "auto", **options}).eval()
    return _models[key]


def generate(path: str, calls: list[dict[str, Any]], fused: bool, **loading: Any) -> list[tuple[Any, Any]]:
    """Tokens and counters of each call, of a model patched for it all."""
    model = load(path, **loading)
    found = []
    with reexecuted_loop(), fused_in_torch() if fused else contextlib.nullcontext():
        hf_fastattn.patch(model, cuda_graphs=True)
        try:
            for call in calls:
                torch.manual_seed(call.pop("seed", 0))
                with torch.no_grad():
                    tokens = model.generate(**call)
                report = hf_fastattn.report(model)
                assert report.pages_in_use == 0
                found.append((tokens, report.last_call))
        finally:
            hf_fastattn.unpatch(model)
    return found
