"""Sums over ranks by size: by the process group, alone and with the norm behind them; sum and norm in one launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hf_fastattn.parallel.peer_memory import MOST_PUSHED, MOST_ROWS

# Rows of a sum: those of steps, and of prompts.
ROWS = (1, 2, 4, 8, 16, 64, 512, 4096)
EPS = 1e-5
LAUNCHES, ROUNDS = 50, 7


def measure_sums(model: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A record of each size, in us; every rank of a patched model calls it at the same time. Nothing without a GPU."""
    ranks = model._fastattn.runtime.ranks
    device, dtype, hidden = model.device, model.dtype, model.config.get_text_config(decoder=True).hidden_size
    if device.type != "cuda" or ranks is None:
        return []
    # Not before: they import Triton.
    from hf_fastattn.kernels.layer.norm import add_rms_norm
    from hf_fastattn.kernels.layer.pushed_norm import pushed_norm
    from hf_fastattn.kernels.layer.summed_norm import summed_norm

    found = []
    for rows in ROWS:
        x = torch.zeros(rows, hidden, dtype=dtype, device=device)
        residual, weight = torch.ones_like(x), torch.ones(hidden, dtype=dtype, device=device)

        def alone(_: int, x: Any = x) -> None:
            dist.all_reduce(x)

        def normed(_: int, x: Any = x, residual: Any = residual, weight: Any = weight) -> None:
            dist.all_reduce(x)
            add_rms_norm(x, residual, weight, EPS, weights_settled=True)

        def by_peers(number: int, rows: int = rows, residual: Any = residual, weight: Any = weight) -> None:
            memory, slot = ranks.peers, number % 2
            summed_norm(
                memory.part(slot, rows), memory.parts(slot), memory.flags, memory.launches, memory.late, memory.rank,
                residual, weight, EPS,
            )  # fmt: skip

        def pushed(_: int, rows: int = rows, residual: Any = residual, weight: Any = weight) -> None:
            memory = ranks.peers
            pushed_norm(
                memory.part(0, rows), memory.inboxes, MOST_PUSHED, memory.pushed, memory.late, memory.rank, residual, weight,
                EPS,
            )  # fmt: skip

        row = {
            "rows": rows,
            "bytes": x.nbytes,
            "group": _microseconds(alone, device),
            "group_norm": _microseconds(normed, device),
            "peers_norm": _microseconds(by_peers, device) if ranks.peers is not None and rows <= MOST_ROWS else None,
            "pushed_norm": _microseconds(pushed, device) if ranks.peers is not None and rows <= MOST_PUSHED else None,
            "one_shot": _one_shot(x, device) if rows <= MOST_ROWS else None,
        }
        found.append(row)
        say(f"sum of {x.nbytes} bytes: {row}")
    if ranks.peers is not None and bool(ranks.peers.late):
        raise RuntimeError("a rank came late to a sum: these times are worth nothing")
    return found


def _one_shot(x: Any, device: torch.device) -> float | None:
    """PyTorch's own sum in memory that all GPUs read; None where it has none."""
    try:
        import torch.distributed._symmetric_memory as symmetric

        held = symmetric.empty(x.numel(), dtype=x.dtype, device=device)
        group: Any = dist.group.WORLD
        symmetric.rendezvous(held, group)
        name = group.group_name
        return _microseconds(lambda _: torch.ops.symm_mem.one_shot_all_reduce(held, "sum", name), device)
    except (RuntimeError, AttributeError, ImportError):
        return None


def _microseconds(launch: Callable[[int], Any], device: torch.device) -> float:
    """Of one of many launches in a CUDA graph, the median of replays."""
    launch(0)
    launch(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # The process group's own thread may ask for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for number in range(LAUNCHES):
            launch(number)
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Of two replays the first one lets the ranks meet.
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)
