"""What runs in each of two processes with a GPU of its own, over NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import static_inputs
from hf_fastattn.parallel.later_sums import CopiedSums
from hf_fastattn.patches.fused import halves
from tests.parallel.ranks import load, one, rank


def _here(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def tokens_of(path: str, calls: list[dict[str, Any]]) -> list[tuple[Any, Any, Any]]:
    """Of each call stock's tokens, those of the patched model in three such calls, and counters of the last of these."""
    model = load(path)
    given, found = [_here(model, call) for call in calls], []
    with torch.no_grad():
        wanted = [model.generate(**call).cpu() for call in given]
    with hf_fastattn.patched(model):
        for call, want in zip(given, wanted, strict=True):
            ours = [one(model, call) for _ in range(3)]
            found.append((want, [tokens.cpu() for tokens, _ in ours], ours[-1][1]))
    return found


def in_halves(path: str, call: dict[str, Any]) -> tuple[Any, list[Any], int, str | None]:
    """Tokens of a call whose prompt is computed whole, and of three in halves; sums by copies; why there were none."""
    model = load(path)
    given = _here(model, call)
    with hf_fastattn.patched(model):
        whole, _ = one(model, given)
    begin, count = CopiedSums.begin, 0

    def counted(self: Any, part: Any, bias: Any) -> Any:
        nonlocal count
        count += 1
        return begin(self, part, bias)

    with pytest.MonkeyPatch.context() as patch, hf_fastattn.patched(model):
        for name, value in (("FEWEST_TOKENS", 8), ("FEWEST_PRODUCTS", 1), ("TILE", 24), ("most_tokens", lambda _: 0)):
            patch.setattr(halves, name, value)
        # Prompts as short as these are recorded, in passes of their own; those in halves never are.
        for name in ("FEWEST_CAPTURED", "MOST_CAPTURED"):
            patch.setattr(static_inputs, name, 0)
        # The trial of the slots comes first, and is not counted.
        one(model, given)
        patch.setattr(CopiedSums, "begin", counted)
        found = [one(model, given)[0].cpu() for _ in range(3)]
        return whole.cpu(), found, count, model._fastattn.runtime.ranks.why_no_peers


def with_a_hook_on_rank_1(path: str, call: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Stock's tokens; those of the patched model with a hook on one rank alone, and without it; counters of both."""
    model = load(path)
    given = _here(model, call)
    with torch.no_grad():
        want = model.generate(**given).cpu()
    with hf_fastattn.patched(model):
        mlp = model.model.layers[1].mlp
        handles = [mlp.register_forward_hook(lambda *_: None)] if rank() == 1 else []
        hooked, apart = one(model, given)
        for handle in handles:
            handle.remove()
        after, looped = one(model, given)
    return want, hooked.cpu(), after.cpu(), apart, looped
