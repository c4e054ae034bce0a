"""The calls of `generate()` that TRL's GRPOTrainer makes, on the dtypes, wrappers and modes that it makes them under.

    python -m hf_fastattn.eval.rollouts --output results
    python -m hf_fastattn.eval.rollouts --shape qwen3-0.6b --state fp32+accelerate+train --prompts 8 --samples 8

Each prompt comes `samples` times in a row, drawn at temperature 1, in train mode under `no_grad`; between two rollouts all
weights change in place, as by an optimiser. The exit status is 1 if a state fell back to Transformers' path, was slower
than stock, or failed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.generate_speed.bench import free_memory
from hf_fastattn.eval.generate_speed.systems import twin
from hf_fastattn.eval.kernel_speed.ceilings import measure_ceilings
from hf_fastattn.eval.matrix_cells.measure import SLOWER
from hf_fastattn.eval.matrix_cells.peaks import watched
from hf_fastattn.eval.matrix_cells.states import around, dtype_of, put
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.shapes import random_model

NOTES = """First: a call of one token. A token: the difference between calls of `1 + new` tokens and of one, over `new`; of
stock fewer tokens are timed. Both in ms, medians of interleaved rounds; weights change in place before each. Limit: reading
the weights once in the dtype that products are computed in, and the K/V of the call's rows. Peak: MB over the weights."""
TIMED = ("first token", "a token")
HEAD = (
    "state",
    "first, stock",
    "ours",
    "a token, stock",
    "ours",
    "times faster",
    "share of limit",
    "peak, stock",
    "ours",
    "path",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a state fell back, was slower or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parser("bench rollouts").parse(argv)
    device = torch.device(options.device or default_device())
    start = time.perf_counter()
    read = measure_ceilings(device, torch.bfloat16).read if device.type == "cuda" else None
    rows, failed = [], []
    for state in options.state:
        try:
            rows.append(_measure(state, options, device, read))
        except Exception as error:
            traceback.print_exc()
            failed.append({"state": state, "error": f"{type(error).__name__}: {error}"})
        print(f"{time.perf_counter() - start:6.1f} s  {state}", flush=True)
    record = {
        "command": command("hf_fastattn.eval.rollouts", argv),
        "environment": environment(device),
        "settings": {name: getattr(options, name) for name in ("shape", "prompts", "samples", "length", "new", "pairs")},
        "seconds": time.perf_counter() - start,
        "read_tbs": read and read / 1e12,
        "states": rows,
        "failed": failed,
    }
    report.write(options.output, "rollouts", markdown(record), record, None)
    print(json.dumps(report.finite(record)))
    return 1 if failed or any(row["wrong"] for row in rows) else 0


def _measure(state: str, options: Any, device: torch.device, read: float | None) -> dict[str, Any]:
    free_memory()
    base = random_model(options.shape, device, dtype_of(state))
    other, limit = twin(base), None if read is None else 1e3 * _bytes_a_token(base, state, options) / read
    models = {"stock": put(base, state), "ours": hf_fastattn.patch(put(other, state))}
    new = {"stock": options.stock_new, "ours": options.new}
    peaks: dict[str, int | None] = {}
    for name, model in models.items():
        with watched(device) as peak:
            for seed in range(2):
                _seconds(model, state, options, seed, 1 + new[name])
        peaks[name] = None if peak is None else peak.total
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for pair in range(options.pairs):
        for name in list(models)[:: 1 if pair % 2 else -1]:
            _step(models[name])
            first = _seconds(models[name], state, options, 2 * pair, 1)
            whole = _seconds(models[name], state, options, 2 * pair + 1, 1 + new[name])
            times[name].append((1e3 * first, 1e3 * (whole - first) / new[name]))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in times.items()}
    path, wrong = _path(models["ours"], options)
    slow = slower(medians["ours"], medians["stock"])
    return {"state": state, **medians, "limit_ms": limit, "peaks": peaks, "path": path, "wrong": [*wrong, *slow]}


def slower(ours: Sequence[float], stock: Sequence[float]) -> list[str]:
    """Which of TIMED take ours longer than stock; a difference of two calls of stock that is below zero says nothing."""
    return [word for word, a, b in zip(TIMED, ours, stock, strict=True) if 0.0 < SLOWER["cuda"] * b < a]


def _path(model: Any, options: Any) -> tuple[str, list[str]]:
    """What ran the last call, and what is wrong with that."""
    call = hf_fastattn.report(model).last_call
    assert call is not None
    reasons = {**call.not_looped, **call.fallbacks, **call.uncaptured}
    words = "the device's loop" if call.fast_loops and not reasons else f"{reasons}"
    once = call.prompt_tokens == options.prompts * options.length
    words += "; each prompt computed once" if once else f"; {call.prompt_tokens} prompt tokens computed"
    # Without a GPU nothing is recorded.
    looped = call.fast_loops == 1 or model.device.type != "cuda"
    return words, [*(() if looped and not call.fallbacks else ("another path",)), *(() if once else ("prompts",))]


def _prompts(options: Any, device: torch.device, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (options.prompts, options.length), generator=generator)
    return ids.repeat_interleave(options.samples, 0).to(device)


def _seconds(model: Any, state: str, options: Any, seed: int, new: int) -> float:
    ids = _prompts(options, model.device, model.config.vocab_size, seed)
    torch.manual_seed(seed)
    _wait(model.device)
    start = time.perf_counter()
    with torch.no_grad(), around(state, model.device):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, temperature=1.0,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    _wait(model.device)
    return time.perf_counter() - start


def _step(model: Any) -> None:
    """Change all weights a little, in place, without PyTorch's version counters."""
    for parameter in model.parameters():
        parameter.data.mul_(1.0 + 1e-4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_a_token(model: Any, state: str, options: Any) -> int:
    """Bytes that a step has to read: weights in the dtype of products, and keys and values of a call that is half done."""
    words = state.split("+")
    # PEFT's generate() calls the model inside of accelerate's wrapper.
    narrow = words[0] in ("bf16", "fp16") or "autocast" in words or ("accelerate" in words and "lora" not in words)
    size = 2 if narrow else 4
    config = model.config
    skipped = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - skipped
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # A shared prompt is stored and read once.
    tokens = options.prompts * options.length + options.prompts * options.samples * options.new // 2
    return size * (weights + a_token * tokens)


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    settings = record["settings"]
    lines = ["# Rollouts of GRPO", "", report.environment_lines(record), ""]
    lines += [
        f"`{settings['shape']}`, random weights; {settings['prompts']} prompts of {settings['length']} tokens, "
        f"{settings['samples']} samples of each; `new` {settings['new']}, {settings['pairs']} rounds.",
        "",
        NOTES,
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in record["states"]]
    lines += [f"- **RED** {row['state']}: {', '.join(row['wrong'])}" for row in record["states"] if row["wrong"]]
    lines += [f"- **{found['state']} failed**: {found['error']}" for found in record["failed"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    (first, token), (our_first, our_token) = row["stock"], row["ours"]
    figures = [f"{value:.2f}" for value in (first, our_first, token, our_token)]
    share = "" if row["limit_ms"] is None else f"{row['limit_ms'] / our_token:.2f}"
    peaks = ["" if peak is None else f"{peak / 1e6:.0f}" for peak in row["peaks"].values()]
    return [row["state"], *figures, f"{token / our_token:.1f}", share, *peaks, row["path"]]


if __name__ == "__main__":
    raise SystemExit(main())
