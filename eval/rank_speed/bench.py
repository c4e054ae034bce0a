"""`generate()` of a model that is spread over ranks: patched, stock, and patched on one GPU where the whole model fits."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_fastattn
from hf_fastattn.eval.accuracy import variants
from hf_fastattn.eval.arguments import Parser
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.eval.generate_speed.bench import free_memory, problems
from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.limit import key_value_bytes, weight_bytes
from hf_fastattn.eval.generate_speed.systems import System
from hf_fastattn.eval.kernel_speed.ceilings import measure_ceilings
from hf_fastattn.eval.rank_speed.samples import measure_samples
from hf_fastattn.eval.rank_speed.sums import measure_sums
from hf_fastattn.eval.rank_speed.table import markdown, samples_markdown
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, environment
from hf_fastattn.eval.shapes import random_model, random_part, shape_config

# Cases without --batch.
ON_GPU = (Case("greedy", 1, 512), Case("greedy", 64, 1024), Case("greedy", 1, 8192))
ON_CPU = (Case("greedy", 1, 32), Case("greedy", 4, 32))
# Ranks may wait for one of them, which measures a whole model by itself.
PATIENCE = datetime.timedelta(minutes=20)
# Share of a GPU's memory that weights may take; the rest is for pages and what steps compute in.
MOST_WEIGHTS = 0.8


def run(made: Parser, options: argparse.Namespace, argv: list[str]) -> int:
    """Measure on all ranks; the first one writes the report. 1 if a case fell back or failed.

    Args:
        made: says what is wrong with the options.
        options: of `bench generate`.
        argv: as given.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        made.error("--tp needs processes: torchrun --nproc-per-node N -m hf_fastattn.eval.speed --tp ...")
    unused = [name for name in ("kind", "compile", "check", "profile") if getattr(options, name)]
    if unused:
        made.error(f"--{unused[0]} is not measured over ranks; leave it out")
    with _group() as device:
        bench = _RankBench(options, device)
        record = bench.samples() if options.samples else bench.record()
        record = {"command": command("hf_fastattn.eval.speed", argv), "environment": environment(device), **record}
        if dist.get_rank() == 0:
            name, text = ("ranks-samples", samples_markdown) if options.samples else ("ranks", markdown)
            report.write(options.output, name, text(record), record, None)
            print(json.dumps(report.finite(record)))
    return 1 if record["failed"] or any(row.get("problems") for row in record["cases"]) else 0


@contextmanager
def _group() -> Iterator[torch.device]:
    """The process group of all ranks, and this one's device."""
    on_gpu, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    bound: dict[str, Any] = {"device_id": device} if on_gpu else {}
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE, **bound)
    try:
        yield device
    finally:
        dist.destroy_process_group()


class _RankBench:
    """What one rank does.

    Args:
        options: of `bench generate`.
        device: of this rank.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.dtype = options, device, getattr(torch, options.dtype)
        self.ranks, self.is_first = dist.get_world_size(), dist.get_rank() == 0
        self.on_gpu, self.start = device.type == "cuda", time.perf_counter()
        self.patch = {"cuda_graphs": options.graphs == "on", **dict(variants.parse(options.patch).options)}
        lengths = options.prompt or [512]
        lengths = lengths * (len(options.batch or ()) // len(lengths) or 1)
        standard = ON_GPU if self.on_gpu else ON_CPU
        sizes = zip(options.batch or (), lengths, strict=False)
        self.cases = [Case("greedy", *size) for size in sizes] or list(standard)
        self.failed: list[dict[str, str]] = []

    def say(self, line: str) -> None:
        """A line of progress, once."""
        if self.is_first:
            print(f"{time.perf_counter() - self.start:6.1f} s  {line}", flush=True)

    def record(self) -> dict[str, Any]:
        """All that is measured."""
        read = measure_ceilings(self.device, self.dtype).read if self.on_gpu else None
        model = hf_fastattn.patch(self._spread(), **self.patch)
        limits = [self._limit(model, case, read) for case in self.cases]
        ours = [self._attempt(case, model, self.options.new) for case in self.cases]
        ranks = model._fastattn.runtime.ranks
        why = "not understood" if ranks is None else ranks.why_no_peers or ("" if ranks.peers else "not asked for")
        sums = measure_sums(model, self.say)
        hf_fastattn.unpatch(model)
        stock = [self._attempt(case, model, self.options.stock_new, stock=True) for case in self.cases]
        del model
        free_memory()
        one = self._on_one()
        rows = []
        for number, case in enumerate(self.cases):
            measured = ours[number]
            if measured is not None:
                row = {**asdict(case), "name": case.name, "limit_ms": limits[number], "ours": measured}
                row |= {"one": one[number], "stock": stock[number], "problems": measured.pop("problems")}
                rows.append(row)
        return {
            **self._settings(),
            "read_tbs": None if read is None else read / 1e12,
            "peers": f"by the process group ({why})" if why else "in memory that all GPUs read",
            "cases": rows,
            "sums": sums,
            "failed": self.failed,
        }

    def samples(self) -> dict[str, Any]:
        """All that is measured of samples."""
        model = hf_fastattn.patch(self._spread(), **self.patch)
        counts = self.options.samples * (len(self.cases) // len(self.options.samples) or 1)
        rows = []
        for case, count in zip(self.cases, counts, strict=False):
            try:
                rows.append(measure_samples(model, case, count, self.options.new, self.options.pairs, self.say))
            except Exception as error:
                self.failed.append({"case": f"{case.name}, {count} samples", "error": f"{type(error).__name__}: {error}"})
                self.say(f"{case.name}, {count} samples failed: {error}")
        return {**self._settings(), "cases": rows, "failed": self.failed}

    def _settings(self) -> dict[str, Any]:
        settings = {
            "model": self._name(), "shape": self.options.shape, "layers": self.options.layers, "dtype": self.options.dtype,
            "ranks": self.ranks, "patch": self.patch, "new": self.options.new, "stock_new": self.options.stock_new,
            "pairs": self.options.pairs,
        }  # fmt: skip
        return {"settings": settings, "seconds": time.perf_counter() - self.start}

    def _name(self) -> str:
        if self.options.shape:
            layers = f", {self.options.layers} layers" if self.options.layers else ""
            return f"{self.options.shape}, random weights{layers}"
        return "the shipped checkpoint" if self.options.model == str(SHIPPED) else Path(self.options.model).name

    def _spread(self) -> Any:
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        if self.options.shape:
            model = random_part(shape_config(self.options.shape, self.options.layers), mesh, self.device, self.dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=self.dtype, tp_plan="auto").eval()
        self.say(f"{self._name()}, in {self.ranks} parts")
        return _endless(model)

    def _limit(self, model: Any, case: Case, read: float | None) -> float | None:
        """Milliseconds in which this rank's part of what a step needs is read."""
        if read is None:
            return None
        keys = key_value_bytes(model, case, self.options.new) / self.ranks
        return 1e3 * (weight_bytes(model, case.rows) + keys) / read

    def _attempt(self, case: Case, model: Any, new: int, stock: bool = False, alone: bool = False) -> dict[str, Any] | None:
        name = f"{'stock ' if stock else 'one ' if alone else ''}{case.name}"
        try:
            found = self._measure(case, model, new, stock, alone)
        except Exception as error:
            self.failed.append({"case": name, "error": f"{type(error).__name__}: {error}"})
            self.say(f"{name} failed: {error}")
            return None
        self.say(f"{name}: {found['token_ms']:.3f} ms a token, {found['first_ms']:.1f} ms to the first")
        return found

    def _measure(self, case: Case, model: Any, new: int, stock: bool, alone: bool) -> dict[str, Any]:
        system, wait = System("ours", model, new), (lambda: None) if alone else dist.barrier
        for tokens in (1 + new, 1, 1) if not stock else (2,):
            system.seconds(case, 0, tokens)
        for number in range(1, 1 + (1 if stock else self.options.pairs)):
            wait()
            system.measure(case, number)
        first, token = (statistics.median(getattr(t, name) for t in system.timings) for name in ("first", "token"))
        figures = {"first_ms": 1e3 * first, "token_ms": 1e3 * token, "timings": [asdict(one) for one in system.timings]}
        call = None if stock else hf_fastattn.report(model).last_call
        if call is not None:
            graphs = self.on_gpu and bool(self.patch["cuda_graphs"])
            figures["problems"] = problems(call, 1 + new, graphs)
            if graphs and not call.fast_loops:
                figures["problems"].append(f"the loop did not run on the device: {dict(call.not_looped)}")
        return figures

    def _on_one(self) -> list[dict[str, Any] | None]:
        """The same of the whole model on the first rank's GPU, while the others wait."""
        found: list[dict[str, Any] | None] = [None] * len(self.cases)
        if self.is_first and self._fits():
            model = hf_fastattn.patch(_endless(self._whole()), **self.patch)
            found = [self._attempt(case, model, self.options.new, alone=True) for case in self.cases]
        dist.barrier()
        return found

    def _fits(self) -> bool:
        if not self.on_gpu or not self.options.shape:
            return True
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(shape_config(self.options.shape, self.options.layers), dtype=self.dtype)
        room = torch.cuda.get_device_properties(self.device).total_memory
        return sum(weight.nbytes for weight in whole.parameters()) < MOST_WEIGHTS * room

    def _whole(self) -> Any:
        if self.options.shape:
            return random_model(self.options.shape, self.device, self.dtype, self.options.layers)
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=self.dtype).to(self.device).eval()


def _endless(model: Any) -> Any:
    """The model, which never stops by itself."""
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model
