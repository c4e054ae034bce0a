"""Speed of `model.generate()`: stock Transformers against the patched model, in interleaved pairs in one process.

    python -m hf_fastattn.eval.speed --model <hub id or path> --batch 1 8 --prompt 512 --new 64 --pairs 9
    python -m hf_fastattn.eval.speed --shape llama-3-8b --compile --profile 1 16 --output results
    torchrun --nproc-per-node 4 -m hf_fastattn.eval.speed --tp --shape llama-3-70b --output results

Without --batch a standard set of cases runs. Of each case first whether both compute the same (no ratio is printed on
red), then stock with its dynamic cache, with --compile also stock with a static cache and `torch.compile`, and the
patched model, in turn, in alternating order, so that a drift of the machine's speed cancels in the ratios. Times are
those of whole calls of `generate()`. The exit status is 1 if a case was wrong, fell back to Transformers' own path, or
failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_fastattn.eval.accuracy import variants
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.eval.generate_speed.bench import Bench, Settings, free_memory
from hf_fastattn.eval.generate_speed.cases import Case, choose
from hf_fastattn.eval.generate_speed.plot import draw_speed
from hf_fastattn.eval.generate_speed.step_profile import profile_step
from hf_fastattn.eval.generate_speed.table import is_green, markdown
from hf_fastattn.eval.models import named
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.shapes import random_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was red or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    made = parser("bench generate")
    options = made.parse(argv)
    device = torch.device(options.device or default_device())
    on_gpu = device.type == "cuda"
    if (options.compile or options.profile) and not on_gpu:
        made.error("--compile and --profile need a CUDA device")
    # On a GPU a long prompt takes as long as a hundred tokens: fewer would drown in its variation.
    options.new = options.new if options.new is not None else (256 if on_gpu else 32)
    options.stock_new = options.stock_new if options.stock_new is not None else (16 if on_gpu else options.new)
    options.dtype = ("bfloat16" if on_gpu else "float32") if options.dtype == "auto" else options.dtype
    if options.tp:
        # Not before: it needs processes that torchrun has started.
        from hf_fastattn.eval.rank_speed import bench as rank_bench

        return rank_bench.run(made, options, argv)
    if options.layers or options.samples:
        made.error("--layers and --samples are measured over ranks: give --tp, under torchrun")
    dtype: torch.dtype = getattr(torch, options.dtype)
    try:
        cases = choose(options.kind, options.batch, options.prompt, on_gpu)
        settings = _settings(options, dtype, on_gpu)
        model = _load(options, device, dtype, max(case.prompt for case in cases) + 1 + max(options.new, options.stock_new))
    except (ValueError, OSError) as error:
        made.error(str(error))
    start = time.perf_counter()
    record = _measure(model, cases, settings, options.profile)
    record = {
        "command": command("hf_fastattn.eval.speed", argv),
        "environment": environment(device),
        "settings": {
            "model": _shown(options),
            "shape": options.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "patch": dict(settings.patch),
            "new": settings.new,
            "stock_new": settings.stock_new,
            "pairs": settings.pairs,
        },
        "seconds": time.perf_counter() - start,
        **record,
    }
    report.write(options.output, "speed", markdown(record), record, lambda plt: draw_speed(plt, record))
    print(json.dumps(report.finite(record)))
    return 0 if record["cases"] and all(map(is_green, record["cases"])) and not record["failed"] else 1


def _settings(options: argparse.Namespace, dtype: torch.dtype, on_gpu: bool) -> Settings:
    variant = variants.parse(options.patch)
    if variant.share:
        raise ValueError("share is no option of patch(); the kind `samples` shares prompts")
    return Settings(
        new=options.new,
        stock_new=options.stock_new,
        pairs=options.pairs,
        # There stock computes every copy of a long prompt, for seconds a call.
        once=("samples",) if on_gpu else (),
        compile=options.compile,
        check_each=(options.check or ("case" if dtype == torch.float32 else "kind")) == "case",
        patch={"cuda_graphs": options.graphs == "on", **dict(variant.options)},
    )


def _load(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, longest: int) -> Any:
    """The model in eval mode; it never stops by itself and chooses as each case says."""
    if options.shape:
        model = random_model(options.shape, device, dtype)
    else:
        with named(options.model):
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        model = model.to(device).eval()
    most = model.config.get_text_config().max_position_embeddings
    if longest > most:
        raise ValueError(f"a case takes {longest} positions, but the model has {most}; shorten --prompt or --new")
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model


def _shown(options: argparse.Namespace) -> str:
    """The model's name; of a path its last part."""
    if options.shape:
        return f"{options.shape}, random weights"
    if options.model == str(SHIPPED):
        return "the shipped checkpoint"
    return Path(options.model).name if Path(options.model).exists() else options.model


def _measure(model: Any, cases: Sequence[Case], settings: Settings, profiled: Sequence[int]) -> dict[str, Any]:
    """The records of all cases and profiles. One that fails is named, and the others go on."""

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {line}", flush=True)

    def attempt(name: str, run: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        free_memory()
        try:
            return [run()]
        except Exception as error:
            traceback.print_exc()
            failed.append({"case": name, "error": f"{type(error).__name__}: {error}"})
            return []

    def profile(rows: int) -> dict[str, Any]:
        prompt = next((case.prompt for case in cases if case.rows == rows and case.kind == "greedy"), 512)
        return profile_step(bench.patched_system(), Case("greedy", rows, prompt))

    start = time.perf_counter()
    failed: list[dict[str, str]] = []
    bench = Bench(model, settings, say)
    rows = [row for case in cases for row in attempt(f"{case.kind} {case.name}", partial(bench.measure, case))]
    profiles = [found for count in profiled for found in attempt(f"profile of {count} rows", partial(profile, count))]
    read_tbs = None if bench.read is None else bench.read / 1e12
    return {"read_tbs": read_tbs, "cases": rows, "failed": failed, "profiles": profiles}


if __name__ == "__main__":
    raise SystemExit(main())
