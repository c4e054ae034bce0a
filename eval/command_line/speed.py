"""The options of the commands that time it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hf_fastattn.eval.choices import (
    BATCHING,
    DTYPES,
    KINDS,
    KV_DTYPES,
    MIXTURES,
    PARALLEL,
    ROLLOUTS,
    ROUTINGS,
    SERVED,
    SHAPES,
    VARIANTS,
)
from hf_fastattn.eval.command_line.values import above_zero, add_model, checkpoint, positive


def add_generate(made: argparse.ArgumentParser) -> None:
    """Whole calls of generate(), stock and patched in turn, once both are seen to compute the same. Exits with 1 if a case
    is wrong, falls back to Transformers' own path, or fails."""
    add_model(made)
    made.add_argument("--shape", choices=sorted(SHAPES), help="a model of this shape with random weights instead")
    kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
    made.add_argument("--kind", nargs="+", choices=KINDS, help=f"only these kinds of calls. {kinds}")
    made.add_argument("--batch", type=int, nargs="+", help="rows of each case (default: the standard set)")
    made.add_argument(
        "--prompt", type=int, nargs="+", help="tokens of the prompts, one for each of --batch or for all (512)"
    )
    made.add_argument("--new", type=positive, help="tokens after the first that are timed (default: 256 on a GPU, else 32)")
    made.add_argument("--stock-new", type=positive, help="the same for stock (default: 16 on a GPU, else as --new)")
    made.add_argument("--pairs", type=positive, default=3, help="interleaved rounds, of which the medians count")
    made.add_argument("--compile", action="store_true", help="also a static cache with torch.compile (CUDA only; slow)")
    made.add_argument("--graphs", choices=("on", "off"), default="on", help="replay decode steps from CUDA graphs")
    made.add_argument("--patch", default="", metavar="OPTION=VALUE,...", help="further options of patch()")
    ranks = 'tensor parallel, under torchrun: the model in parts (tp_plan="auto"), against one GPU where it fits, and sums'
    made.add_argument("--tp", action="store_true", help=ranks)
    made.add_argument("--layers", type=positive, help="with --tp and --shape: so many layers instead of all")
    sampled = "with --tp: so many samples of each prompt instead, one for each of --batch or for all, shared and not"
    made.add_argument("--samples", type=positive, nargs="+", help=sampled)
    made.add_argument(
        "--check",
        choices=("kind", "case"),
        help="check agreement for the first case of each kind, or for every case (default: case in fp32, else kind)",
    )
    made.add_argument(
        "--profile", type=int, nargs="+", default=[], metavar="B", help="kernels of a greedy step of B rows (CUDA only)"
    )
    made.add_argument("--output", type=Path, help="folder for speed.md, .json and .png")


def add_attention(made: argparse.ArgumentParser) -> None:
    """The attention kernels against PyTorch's, FlashInfer's where it is installed, and the speed of memory. Exits with 1 if
    a result is wrong. Without a GPU the reference runs small shapes."""
    made.add_argument("--page-size", type=int, default=16, help="tokens a page")
    made.add_argument("--rounds", type=int, default=11, help="interleaved rounds, of which the medians count")
    made.add_argument("--kind", nargs="+", choices=("decode", "append", "prefill", "shared"), help="only these")
    made.add_argument("--layouts", action="store_true", help="also some shapes by page size and order in memory")
    others = "variants of attention instead, all or these, against plain and compiled FlexAttention"
    made.add_argument("--variants", nargs="*", choices=VARIANTS, metavar="NAME", help=f"{others}: {', '.join(VARIANTS)}")
    made.add_argument("--output", type=Path, help="folder for attention.md, .json and .png, or attention-variants.md")


def add_experts(made: argparse.ArgumentParser) -> None:
    """The kernels of a mixture of experts against PyTorch's grouped product, and the speeds of memory and of a matrix
    product. Exits with 1 if a result is wrong. Without a GPU the reference runs a small shape."""
    made.add_argument("--model", nargs="+", choices=MIXTURES, default=list(MIXTURES), help="sizes of these (default: all)")
    made.add_argument("--tokens", type=positive, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096], help="tokens at once")
    made.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="who goes where")
    made.add_argument("--rounds", type=positive, default=11, help="interleaved rounds, of which the medians count")
    made.add_argument("--output", type=Path, help="folder for experts.md and .json")


def add_eight_bits(made: argparse.ArgumentParser) -> None:
    """Keys and values in 8 bits against 16: decode attention, the append, generate() and its memory. Exits with 1 if a
    result is wrong. Without a GPU the reference runs small shapes."""
    made.add_argument("--rounds", type=positive, default=11, help="interleaved rounds, of which the medians count")
    made.add_argument("--layers", type=positive, default=8, help="layers of the model that generates, of Llama-3-8B's width")
    made.add_argument("--batch", type=int, default=64, help="its prompts; 0 leaves generate() out")
    made.add_argument("--only-generate", action="store_true", help="leave out attention and the append")
    made.add_argument("--prompt", type=positive, default=4096, help="tokens of each")
    made.add_argument("--new", type=positive, default=512, help="tokens after the first that are timed")
    made.add_argument("--pairs", type=positive, default=3, help="interleaved rounds of generate()")
    made.add_argument("--kv-dtype", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), help="formats (default: all)")
    made.add_argument("--output", type=Path, help="folder for eight-bits.md and .json")


def add_matrix(made: argparse.ArgumentParser) -> None:
    """Small cases of every kind of call, family and state, stock and ours in turn. Exits with 1 if ours is slower or larger
    than stock anywhere, computes something else, or fails."""
    made.add_argument("--cell", nargs="+", metavar="PATTERN", help="only these, as '*/bf16/*' (family/state/call)")
    made.add_argument("--quick", action="store_true", help="a few cells, one pair each")
    made.add_argument("--pairs", type=positive, help="interleaved rounds, of which the medians count (default: 5)")
    made.add_argument("--new", type=positive, help="tokens after the first that are timed (default: 32 on a GPU, else 24)")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for matrix-DEVICE.md and .json")


def add_rollouts(made: argparse.ArgumentParser) -> None:
    """The calls that TRL's GRPOTrainer makes, stock and ours in turn, the weights changed before each. Exits with 1 if ours
    falls back, is slower or fails."""
    made.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="random weights of a known shape")
    made.add_argument(
        "--state", nargs="+", default=ROLLOUTS, help="dtype and words, as in the matrix (default: %(default)s)"
    )
    made.add_argument("--prompts", type=positive, default=8, help="distinct prompts a call (default: %(default)s)")
    made.add_argument("--samples", type=positive, default=8, help="rows of each prompt (default: %(default)s)")
    made.add_argument("--length", type=positive, default=512, help="tokens of a prompt (default: %(default)s)")
    made.add_argument(
        "--new", type=positive, default=64, help="tokens after the first that are timed (default: %(default)s)"
    )
    made.add_argument("--stock-new", type=positive, default=12, help="the same of stock (default: %(default)s)")
    made.add_argument("--pairs", type=positive, default=3, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for rollouts.md and .json")


def parallel_case(text: str) -> tuple[str, int, int]:
    """A case of `bench parallel` as its kind, rows and tokens in common.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    found = re.fullmatch(rf"({'|'.join(PARALLEL)}):([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no KIND:ROWSxTOKENS, such as samples:16x8192; kinds: {PARALLEL}")
    return found[1], int(found[2]), int(found[3])


def add_parallel(made: argparse.ArgumentParser) -> None:
    """Rows and calls that begin alike: samples, questions about documents, prompts within prompts, chat turns. Stock, ours
    without sharing, ours, and ours with pages that stay between calls. Exits with 1 if more is computed than has to be,
    ours is slower with sharing than without, or a case fails."""
    made.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b", help="random weights of a known shape")
    made.add_argument("--layers", type=positive, help="of the model (default: as many as the shape has)")
    made.add_argument("--kind", nargs="+", choices=PARALLEL, default=list(PARALLEL), help="only these")
    made.add_argument("--rows", type=positive, nargs="+", default=[1, 4, 16, 64, 256], help="rows (default: %(default)s)")
    made.add_argument(
        "--length",
        type=positive,
        nargs="+",
        default=[512, 2048, 8192, 32768],
        help="tokens in common (default: %(default)s)",
    )
    made.add_argument("--own", type=positive, default=32, help="tokens of a question, at most (default: %(default)s)")
    made.add_argument("--turns", type=positive, default=20, help="of a chat (default: %(default)s)")
    made.add_argument(
        "--new", type=positive, default=32, help="tokens after the first that are timed (default: %(default)s)"
    )
    made.add_argument("--pairs", type=positive, default=3, help="interleaved rounds (default: %(default)s)")
    made.add_argument(
        "--case", nargs="+", type=parallel_case, metavar="KIND:ROWSxTOKENS", help="only these, such as samples:16x8192"
    )
    made.add_argument("--no-stock", action="store_true", help="leave stock out, which takes most of the time")
    most = "prompt tokens of all rows up to which stock, and ours without sharing, run too (default: %(default)s)"
    made.add_argument("--most", type=positive, default=2**18, help=most)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for parallel.md, .json and .png")


def add_batching(made: argparse.ArgumentParser) -> None:
    """Requests of different lengths: generate_batch() of stock and of the patched model, and generate() of both on padded
    batches; the time between tokens while requests arrive. Exits with 1 if ours is slower than stock, falls back, chooses
    other tokens, keeps pages, or a case fails."""
    cases = "; ".join(f"{name}: {words}" for name, words in BATCHING.items())
    made.add_argument("--case", nargs="+", choices=BATCHING, default=list(BATCHING), help=f"{cases} (fewer on a CPU)")
    made.add_argument(
        "--model", type=checkpoint, help="hub id or path (default: the case's shape on a GPU, else the shipped checkpoint)"
    )
    made.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a known shape instead")
    made.add_argument("--layers", type=positive, help="of such a shape (default: as many as it has)")
    made.add_argument("--system", nargs="+", choices=SERVED, default=list(SERVED), help="only these, and ours")
    made.add_argument("--requests", type=positive, help="at most so many of a case's requests")
    made.add_argument("--most-new", type=positive, help="at most so many of a case's new tokens, in proportion")
    made.add_argument("--pairs", type=positive, default=3, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--stock-rounds", type=positive, help="of stock's systems (default: 1 on a GPU, else as many)")
    seconds = "of stock's generate_batch() in a round; its time is then a lower bound (default: until it is done)"
    made.add_argument("--stock-seconds", type=above_zero, help=seconds)
    token = "tokens after the first that stock's padded calls are timed for; the rest is scaled (default: all)"
    made.add_argument("--stock-new", type=positive, help=token)
    made.add_argument("--stock-batches", type=positive, help="padded calls of stock that are timed (default: all)")
    made.add_argument(
        "--sizes", type=positive, nargs="+", help="rows of padded calls to try (default: 64 and 256 on a GPU, else 8 and 32)"
    )
    made.add_argument("--patch", default="", metavar="OPTION=VALUE,...", help="options of patch(), such as mixed_steps=on")
    attention = "of stock's generate_batch() (default: the quickest of those that are there)"
    made.add_argument("--attention", help=attention)
    rates = "of the load, as shares of what is done where all requests are there at once (default: %(default)s)"
    made.add_argument("--rates", type=above_zero, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help=rates)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for batching.md, .json and .png")


def add_task_speed(made: argparse.ArgumentParser) -> None:
    """lm-evaluation-harness's requests, answered by its own `HFLM` and by `FastLM` on a patched model in turn. Exits with 1
    if ours is slower, computes a token twice, or leaves its own path."""
    add_model(made)
    made.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a known shape instead")
    made.add_argument("--layers", type=positive, help="of such a shape (default: as many as it has)")
    made.add_argument("--task", nargs="+", help="only these of the recorded tasks")
    made.add_argument("--documents", type=positive, default=16, help="questions of each task (default: %(default)s)")
    made.add_argument("--batch", type=positive, default=8, help="lm-evaluation-harness's batch size (default: %(default)s)")
    made.add_argument("--length", type=positive, default=4096, help="most tokens of a request (default: %(default)s)")
    made.add_argument("--pairs", type=positive, default=1, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--requests", type=Path, help="file that --save has written (default: made from the tasks)")
    made.add_argument("--save", type=Path, help="write the requests to this file, and end")
    made.add_argument("--output", type=Path, help="folder for harness-speed.md and .json")
