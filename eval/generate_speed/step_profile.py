"""Which kernels a decode step of `generate()` spends its time in, and how much lies between them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.systems import System

STEPS, SHOWN, ROUNDS = 32, 15, 3
# Name of a kernel or copy: (microseconds, launches).
Kernels = dict[str, tuple[float, float]]


def profile_step(system: System, case: Case) -> dict[str, Any]:
    """The kernels of one step after the first token, by name.

    What runs in a call of one token is taken from what runs in a call of `1 + STEPS`: so the loop is the one that
    `generate()` really runs, and a graph's kernels count one by one. The step's own time is measured without the profiler.

    Args:
        system: a patched model on a CUDA device.
        case: what is called; two calls of equal prompts take equally many kernels for them.
    """
    system.new = STEPS
    system.warm_up(case)
    for number in range(1, ROUNDS + 1):
        system.measure(case, number)
    step = statistics.median(timing.token for timing in system.timings)
    _kernels_of(system, case, 1)
    long, short = (_kernels_of(system, case, tokens) for tokens in (1 + STEPS, 1))
    return {"rows": case.rows, "prompt": case.prompt, **summary(per_step(long, short, STEPS), 1e6 * step)}


def _kernels_of(system: System, case: Case, tokens: int) -> Kernels:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        system.seconds(case, 0, tokens)
    found: Kernels = {}
    for event in recorded.key_averages():
        if event.device_type == DeviceType.CUDA:
            time, launches = found.get(event.key, (0.0, 0.0))
            found[event.key] = time + event.self_device_time_total, launches + event.count
    torch.cuda.synchronize(system.device)
    return found


def per_step(long: Mapping[str, tuple[float, float]], short: Mapping[str, tuple[float, float]], steps: int) -> Kernels:
    """What one step launches, from the sums of a call with `steps` more steps than another."""
    found = {}
    for name, (time, launches) in long.items():
        before, count = short.get(name, (0.0, 0.0))
        if launches > count:
            found[name] = (time - before) / steps, (launches - count) / steps
    return found


def summary(kernels: Kernels, step_us: float) -> dict[str, Any]:
    """The longest kernels, the sum of the others, and the step's time."""
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    others = [item[1] for item in ordered[SHOWN:]]
    return {
        "kernels": [{"name": name, "us": time, "launches": count} for name, (time, count) in ordered[:SHOWN]],
        "other_us": sum(time for time, _ in others),
        "other_launches": sum(count for _, count in others),
        "sum_us": sum(time for time, _ in kernels.values()),
        "step_us": step_us,
    }
