"""What the accuracy evaluations set up from their common options: model, text, variants, journal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import variants
from hf_fastattn.eval.accuracy.feed import Schedule
from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.loop_feed import why_no_loop
from hf_fastattn.eval.accuracy.processes import own_device, processes
from hf_fastattn.eval.accuracy.stock_parts import StockParts
from hf_fastattn.eval.accuracy.texts import Document, documents
from hf_fastattn.eval.accuracy.variants import Variant
from hf_fastattn.eval.accuracy.windows import WindowBatch, batches, choose
from hf_fastattn.eval.arguments import Parser
from hf_fastattn.eval.choices import FORMAT_FAULTS
from hf_fastattn.eval.reporting.environment import command, default_device, environment, settings_hash

Part = TypeVar("Part")


@dataclass(frozen=True)
class Setup:
    """An evaluation about to run."""

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    batches: list[WindowBatch]
    schedule: Schedule
    variants: list[Variant]
    fault: str | None
    layer: int | None
    kv_dtype: str | None
    journal: Journal
    record: dict[str, Any]
    output: Path | None
    quiet: bool
    seed: int
    stock_parts: StockParts

    def stock_part(self, batch: WindowBatch, measure: Callable[[], Part]) -> Part:
        """What `measure` finds of stock alone on a batch, from an earlier run if one of the same settings has kept it."""
        settings = {name: value for name, value in self.record["settings"].items() if name not in ("inject", "layer")}
        key = self.record["evaluation"], settings_hash(settings), batch.windows
        return self.stock_parts.of(key, measure)

    @property
    def documents(self) -> list[int]:
        """The document of each window, in order."""
        return [window.document for batch in self.batches for window in batch.windows]


def set_up(
    name: str, made: Parser, argv: Sequence[str] | None, stock_parts: StockParts | None = None
) -> tuple[argparse.Namespace, Setup]:
    """Parse, load the model and the text, open the journal; `stock_parts` are those of earlier runs, none by default."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = made.parse(argv)
    arguments.device = own_device(arguments.device or default_device())
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if arguments.device.startswith("cuda") else "float32"
    if arguments.inject == "window" and not arguments.window and arguments.model == str(models.SHIPPED):
        arguments.window = 128
    try:
        return arguments, _load(name, arguments, argv, StockParts() if stock_parts is None else stock_parts)
    except (ValueError, ImportError, OSError) as error:
        made.error(str(error))


def _load(name: str, arguments: argparse.Namespace, argv: list[str], stock_parts: StockParts) -> Setup:
    torch.manual_seed(arguments.seed)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    texts = _texts(arguments)
    model, tokenizer = models.load(arguments.model, dtype, arguments.device, arguments.window)
    if arguments.inject == "window" and not getattr(model.config, "sliding_window", None):
        raise ValueError("--inject window needs a model with a sliding window; --window N loads a Llama as one")
    windows = choose(
        texts,
        tokenizer,
        context=arguments.context,
        stride=arguments.stride,
        count=arguments.windows or None,
        seed=arguments.seed,
    )
    kv_dtype = arguments.kv_dtype
    if arguments.inject in FORMAT_FAULTS and kv_dtype is None:
        raise ValueError(f"--inject {arguments.inject} needs 8-bit keys and values; give --kv-dtype")
    chosen = variants.with_format(variants.chosen(arguments.variant, model, arguments.inject), kv_dtype)
    if not chosen:
        raise ValueError(f"argument --inject: {arguments.inject!r} is in steps of the device's loop: {why_no_loop(model)}")
    skip = ("output", "quiet", "threads", "variant")
    settings = {key: value for key, value in vars(arguments).items() if key not in skip}
    settings["model"] = _shown(arguments.model)
    settings["data"] = _shown(arguments.data)
    record = {
        "evaluation": name,
        "command": command(f"hf_fastattn.eval.{name}", argv),
        "settings": settings,
        "variants": [variant.name for variant in chosen],
        "environment": environment(arguments.device),
    }
    text_hash = settings_hash({str(i): window.ids for i, window in enumerate(windows)})
    key = settings_hash({**record, "command": None, "text": text_hash})
    # One process of several keeps the records of all.
    kept = arguments.output is not None and processes().is_first
    journal = Journal(arguments.output / ".journal" / f"{name}-{key}.jsonl" if kept else None, settings)
    return Setup(
        model,
        tokenizer,
        dtype,
        batches(windows, arguments.batch, tokenizer.pad_token_id or 0),
        Schedule(arguments.append, arguments.piece, arguments.decode),
        chosen,
        arguments.inject,
        arguments.layer,
        kv_dtype,
        journal,
        record,
        arguments.output,
        arguments.quiet,
        arguments.seed,
        stock_parts,
    )


def _texts(arguments: argparse.Namespace) -> list[Document]:
    try:
        return documents(
            arguments.data,
            config=arguments.data_config,
            split=arguments.split,
            column=arguments.column,
            limit=arguments.documents,
        )
    except (ValueError, ImportError, OSError) as error:
        raise ValueError(f"argument --data: {error}") from error


def _shown(name: str) -> str:
    """A hub id as it is, a path without the folders it lies in."""
    if name == str(models.SHIPPED):
        return "the shipped checkpoint"
    return Path(name).name if Path(name).exists() else name
