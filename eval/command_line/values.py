"""What options of several commands take: counts, shares, models, texts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hf_fastattn.eval.choices import DTYPES, SHIPPED


def positive(text: str) -> int:
    """A count of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return float(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def checkpoint(text: str) -> str:
    """A hub id, or the path of a folder that exists."""
    if not text or (_is_path(text) and not Path(text).exists()):
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}; give the path of a checkpoint or a hub id")
    return text


def text_source(text: str) -> str:
    """The name of a data set, or the path of a file that exists."""
    is_file = _is_path(text) or text.endswith((".txt", ".json", ".jsonl"))
    if not text or (is_file and not Path(text).expanduser().exists()):
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def _is_path(text: str) -> bool:
    """Whether this can't be the name `owner/name` of something on the hub."""
    return text.startswith((".", "~")) or os.path.isabs(text) or "\\" in text or text.count("/") > 1


def add_model(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--model", type=checkpoint, default=str(SHIPPED), help="hub id or path (default: the shipped checkpoint)"
    )
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
