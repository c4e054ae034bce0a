"""The options of the commands that compare the patched model with stock."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_fastattn.eval.choices import (
    DTYPES,
    EVALUATED,
    FAULTS,
    FORMAT_FAULTS,
    KV_DTYPES,
    RECALLED,
    ROUTING_FAULTS,
    SAMPLERS,
    SAMPLING_FAULTS,
    SHIPPED,
    STEP_FAULTS,
    TOGETHER,
    WINDOWS_16,
    WINDOWS_32,
)
from hf_fastattn.eval.command_line.values import add_model, checkpoint, positive, share, text_source


def _add_kv_dtype(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="patch with this kv_dtype, and compare with stock over a cache that rounds keys and values alike",
    )


def _add_schedule(made: argparse.ArgumentParser) -> None:
    made.add_argument("--append", type=int, default=40, help="tokens of a window that are appended in pieces")
    made.add_argument("--piece", type=int, default=13, help="tokens of such a piece")
    made.add_argument("--decode", type=int, default=32, help="tokens of a window that are decoded one by one")


def _add_accuracy(made: argparse.ArgumentParser, windows: int) -> None:
    add_model(made)
    made.add_argument(
        "--data",
        type=text_source,
        default="heldout",
        help="heldout (shipped), wikitext, c4, a .txt, .json or .jsonl file, or a data set",
    )
    made.add_argument("--data-config", help="configuration of the data set")
    made.add_argument("--split", default="test")
    made.add_argument("--column", default="text")
    made.add_argument("--documents", type=int, default=512, help="most documents to read")
    made.add_argument("--context", type=int, default=512, help="tokens of a window")
    made.add_argument("--stride", type=int, default=128, help="tokens scored in a window")
    made.add_argument("--windows", type=int, default=windows, help="windows drawn from all documents; 0 takes all")
    made.add_argument("--batch", type=int, default=8, help="windows that run together")
    _add_schedule(made)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--variant",
        action="append",
        metavar="OPTION=VALUE,...",
        help="options of patch(), and share=on or off; repeatable (default: every backend and switch, sharing on and off)",
    )
    _add_kv_dtype(made)
    made.add_argument("--window", type=int, help="load the Llama as a Mistral with a sliding window of this many tokens")
    made.add_argument(
        "--inject",
        choices=(*FAULTS, *ROUTING_FAULTS, *FORMAT_FAULTS, *STEP_FAULTS),
        help="plant this fault in the patched model; the verdict must be red",
    )
    made.add_argument("--layer", type=int, help="plant it in this layer only")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for the report (.md, .json, .png) and the journal")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_perplexity(made: argparse.ArgumentParser) -> None:
    """Perplexity of stock and patched on the same tokens, paired token by token. Exits with 1 if a variant alarms."""
    _add_accuracy(made, windows=48)


def add_parity(made: argparse.ArgumentParser) -> None:
    """Logits, hidden states and greedy paths of stock and patched against exact ones. Exits with 1 if a variant alarms."""
    _add_accuracy(made, windows=24)
    made.add_argument("--new", type=int, default=24, help="tokens generated greedily after each window")


def add_logprobs(made: argparse.ArgumentParser) -> None:
    """What generate() says of its tokens against a later forward of them, as GRPO's importance ratio sees it, stock and
    patched. Exits with 1 if a variant alarms."""
    _add_accuracy(made, windows=16)
    made.set_defaults(context=128, stride=64)
    made.add_argument("--new", type=positive, default=24, help="tokens of an answer (default: %(default)s)")
    made.add_argument("--samples", type=positive, default=4, help="answers to a prompt (default: %(default)s)")
    made.add_argument(
        "--top-k", type=positive, default=20, help="likeliest tokens that are drawn from (default: %(default)s)"
    )


def add_all(made: argparse.ArgumentParser) -> None:
    """All evaluations of accuracy, and a table of their verdicts. Exits with 1 if one is red."""
    add_model(made)
    made.add_argument("--evaluations", nargs="+", choices=TOGETHER, default=list(TOGETHER), help="only these")
    made.add_argument("--quick", action="store_true", help="on a set small enough to look at after every change")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for the reports")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_faults(made: argparse.ArgumentParser) -> None:
    """The evaluations with each fault, which two must notice, and over seeds without one. Exits with 1 if one is wrong."""
    made.add_argument("--seeds", type=int, default=20)
    known = (*FAULTS, *ROUTING_FAULTS, *FORMAT_FAULTS, *STEP_FAULTS)
    made.add_argument(
        "--faults", nargs="*", choices=known, help="default: all but those of routers; with --kv-dtype also that of scales"
    )
    made.add_argument("--evaluations", nargs="+", choices=EVALUATED, default=list(EVALUATED), help="only these")
    made.add_argument("--context", type=int, default=256)
    made.add_argument("--stride", type=int, default=64)
    made.add_argument("--windows", type=int, help=f"windows a run; default {WINDOWS_32} in float32, {WINDOWS_16} in 16 bits")
    _add_schedule(made)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--model", type=checkpoint, help="hub id or path of a Llama (default: the shipped checkpoint)")
    made.add_argument("--variant", action="append", help="as for perplexity; repeatable")
    _add_kv_dtype(made)
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for faults.md, faults.json and faults.png")
    made.add_argument("--quiet", action="store_true")


def add_families(made: argparse.ArgumentParser) -> None:
    """Perplexity and parity of small random models of every patched family, in forwards and in the device's loop, with
    pages of earlier prompts and without. Exits with 1 if one alarms."""
    made.add_argument("--families", nargs="+", metavar="FAMILY", help="only these (default: all)")
    made.add_argument("--evaluations", nargs="+", choices=EVALUATED, default=["perplexity", "parity"])
    made.add_argument("--variant", action="append", help="as for perplexity; repeatable (default: all that differ)")
    made.add_argument("--context", type=int, default=160, help="tokens of a window")
    made.add_argument("--stride", type=int, default=40, help="tokens scored in a window")
    made.add_argument("--windows", type=int, default=16, help="windows of each family")
    made.add_argument("--batch", type=int, default=8, help="windows that run together")
    _add_schedule(made)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for families.md and families.json")
    made.add_argument("--quiet", action="store_true")


def add_streaming(made: argparse.ArgumentParser) -> None:
    """Perplexity of a long stream with sinks and a window, without sinks, and encoded again; time and memory of generation.
    Exits with 1 if streaming is more than 3% above encoding again."""
    add_model(made)
    made.add_argument("--data", type=text_source, default="heldout", help="as for perplexity")
    made.add_argument("--tokens", type=positive, default=20_000, help="tokens of the stream, at most")
    made.add_argument("--sinks", type=int, default=4, help="first tokens that stay")
    made.add_argument("--window", type=positive, default=1024, help="last tokens that a token sees at least")
    made.add_argument("--block", type=positive, help="tokens that leave at a time (default: a quarter of the window)")
    made.add_argument("--places", type=positive, default=200, help="places at which the tokens in view are encoded again")
    made.add_argument("--batch", type=positive, default=4, help="of these, encoded together")
    made.add_argument("--new", type=int, default=2000, help="tokens that are generated and timed; 0 for none")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for streaming.md, streaming.json and streaming.png")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_recall(made: argparse.ArgumentParser) -> None:
    """What stock and patched find again in long contexts, by length and depth: needles, pairs to look up, chains of
    variables. Exits with 1 if they differ by more than chance, or keys and values in 8 bits lose more than a point."""
    add_model(made)
    made.add_argument("--tasks", nargs="+", choices=RECALLED, default=list(RECALLED[:3]), help="only these")
    made.add_argument("--lengths", type=positive, nargs="+", help="tokens of a context (default: by the device)")
    made.add_argument("--depths", type=share, nargs="+", help="of what is asked for, 0 the start (default: by the device)")
    made.add_argument("--count", type=positive, help="prompts of each length and depth (default: 48 on a GPU, else 6)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--variant", default="", metavar="OPTION=VALUE,...", help="options of patch()")
    _add_kv_dtype(made)
    made.add_argument(
        "--inject",
        choices=(*FAULTS[:4], *FORMAT_FAULTS),
        help="plant this fault in the patched model; the verdict must be red",
    )
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for recall.md, .json and .png")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_sampling(made: argparse.ArgumentParser) -> None:
    """Tests that drawn tokens follow stock's distribution and are independent between samples, steps, prompts and calls.
    Exits with 1 if one alarms, corrected for their number."""
    made.add_argument(
        "--model", type=checkpoint, default=str(SHIPPED), help="hub id or path (default: the shipped checkpoint)"
    )
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="in 16 bits rounding itself is seen (float32)")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--case", nargs="+", choices=SAMPLERS, help="only these options of draws")
    made.add_argument("--prompts", type=positive, default=4, help="of a batch (default: %(default)s)")
    made.add_argument("--samples", type=positive, default=24, help="of each prompt (default: %(default)s)")
    made.add_argument("--new", type=positive, default=10, help="tokens of a sample (default: %(default)s)")
    made.add_argument("--calls", type=positive, default=4, help="with seeds of their own (default: %(default)s)")
    made.add_argument("--length", type=positive, default=24, help="tokens of a prompt (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--inject", choices=SAMPLING_FAULTS, help="plant this fault; the verdict must be red")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for sampling.md, .json and .png")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_tasks(made: argparse.ArgumentParser) -> None:
    """Tasks of lm-evaluation-harness: scores of stock and patched with standard errors, and how answers differ. Exits with
    1 if they differ by more than rounding makes them, or a request ran another way than ours."""
    add_model(made)
    made.add_argument("--tasks", nargs="+", help="of the harness (default: those that come with the project)")
    made.add_argument("--include-path", nargs="+", help="folders with further tasks")
    made.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    made.add_argument("--limit", type=positive, help="documents of each task, at most")
    made.add_argument("--batch", type=positive, default=8, help="the harness's batch size (default: %(default)s)")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for tasks.md, .json and .png")
    made.add_argument("--quiet", action="store_true", help="no messages of the harness")


def add_lm_eval(made: argparse.ArgumentParser) -> None:
    """lm-evaluation-harness's own command with `--model hf-fastattn`, which is the default. All options are the harness's
    (`lm_eval run --help` lists them)."""


def add_report(made: argparse.ArgumentParser) -> None:
    """One HTML page from everything that evaluations and benchmarks wrote into a folder. Exits with 1 if a record is red."""
    made.add_argument(
        "results", type=Path, nargs="?", default=SHIPPED.parents[1] / "results", help="folder (default: the project's own)"
    )
    made.add_argument("--output", type=Path, default=Path("report.html"), help="the file (default: %(default)s)")
