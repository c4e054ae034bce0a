"""The command line that the accuracy evaluations share, and what it sets up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_fastattn.eval import models, variants
from hf_fastattn.eval.environment import command, environment, settings_hash
from hf_fastattn.eval.faults import FAULTS
from hf_fastattn.eval.feed import Schedule
from hf_fastattn.eval.journal import Journal
from hf_fastattn.eval.texts import documents
from hf_fastattn.eval.variants import Variant
from hf_fastattn.eval.windows import WindowBatch, batches, choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    journal: Journal
    record: dict[str, Any]
    output: Path | None
    quiet: bool

    @property
    def documents(self) -> list[int]:
        """The document of each window, in order."""
        return [window.document for batch in self.batches for window in batch.windows]


def parser(name: str, description: str, *, windows: int, batch: int) -> argparse.ArgumentParser:
    """The options; `windows` and `batch` are defaults."""
    made = argparse.ArgumentParser(
        prog=f"hf-fastattn eval {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default=str(models.SHIPPED), help="hub id or path (default: the shipped checkpoint)")
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--data", default="heldout", help="heldout (shipped), wikitext, c4, a .txt, .json or .jsonl file, or a data set"
    )
    made.add_argument("--data-config", help="configuration of the data set")
    made.add_argument("--split", default="test")
    made.add_argument("--column", default="text")
    made.add_argument("--documents", type=int, default=512, help="most documents to read")
    made.add_argument("--context", type=int, default=512, help="tokens of a window")
    made.add_argument("--stride", type=int, default=128, help="tokens scored in a window")
    made.add_argument("--windows", type=int, default=windows, help="windows drawn from all documents; 0 takes all")
    made.add_argument("--batch", type=int, default=batch, help="windows that run together")
    made.add_argument("--append", type=int, default=40, help="tokens of a window that are appended in pieces")
    made.add_argument("--piece", type=int, default=13, help="tokens of such a piece")
    made.add_argument("--decode", type=int, default=32, help="tokens of a window that are decoded one by one")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--variant",
        action="append",
        metavar="OPTION=VALUE,...",
        help="options of patch(), and share=on or off; repeatable (default: every backend and switch, sharing on and off)",
    )
    made.add_argument("--window", type=int, help="load the Llama as a Mistral with a sliding window of this many tokens")
    made.add_argument("--inject", choices=FAULTS, help="plant this fault in the patched model; the verdict must be red")
    made.add_argument("--layer", type=int, help="plant it in this layer only")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for the report (.md, .json, .png) and the journal")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def set_up(name: str, made: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setup]:
    """Parse, load the model and the text, open the journal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = made.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if arguments.device.startswith("cuda") else "float32"
    if arguments.inject == "window" and not arguments.window and arguments.model == str(models.SHIPPED):
        arguments.window = 128
    try:
        return arguments, _load(name, arguments, argv)
    except (ValueError, ImportError, OSError) as error:
        made.error(str(error))


def _load(name: str, arguments: argparse.Namespace, argv: list[str]) -> Setup:
    torch.manual_seed(arguments.seed)
    dtype = DTYPES[arguments.dtype]
    texts = documents(
        arguments.data,
        config=arguments.data_config,
        split=arguments.split,
        column=arguments.column,
        limit=arguments.documents,
    )
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
    chosen = variants.chosen(arguments.variant, model)
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
    journal = Journal(arguments.output / ".journal" / f"{name}-{key}.jsonl" if arguments.output else None, settings)
    return Setup(
        model,
        tokenizer,
        dtype,
        batches(windows, arguments.batch, tokenizer.pad_token_id or 0),
        Schedule(arguments.append, arguments.piece, arguments.decode),
        chosen,
        arguments.inject,
        arguments.layer,
        journal,
        record,
        arguments.output,
        arguments.quiet,
    )


def _shown(name: str) -> str:
    """A hub id as it is, a path without the folders it lies in."""
    if name == str(models.SHIPPED):
        return "the shipped checkpoint"
    return Path(name).name if Path(name).exists() else name
