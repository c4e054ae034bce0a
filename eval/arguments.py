"""The options of every command, without PyTorch, so that help and mistakes are answered at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from hf_fastattn.eval.choices import (
    BATCHING,
    DTYPES,
    EVALUATED,
    FAULTS,
    FORMAT_FAULTS,
    KINDS,
    KV_DTYPES,
    MIXTURES,
    PARALLEL,
    RECALLED,
    ROLLOUTS,
    ROUTING_FAULTS,
    ROUTINGS,
    SAMPLERS,
    SAMPLING_FAULTS,
    SERVED,
    SHAPES,
    SHIPPED,
    STEP_FAULTS,
    WINDOWS_16,
    WINDOWS_32,
)  # fmt: skip

PROMPT = 'def read_lines(path):\n    """Return the lines of a file as a list of strings."""\n'


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End with the message, on one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, once the folder that `--output` names is there."""
        arguments = self.parse_args(argv)
        folder = getattr(arguments, "output", None)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.error(f"argument --output: folder {str(folder)!r} cannot be made: {error.strerror}")
            if not os.access(folder, os.W_OK):
                self.error(f"argument --output: folder {str(folder)!r} cannot be written to")
        return arguments


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


def _add_model(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--model", type=checkpoint, default=str(SHIPPED), help="hub id or path (default: the shipped checkpoint)"
    )
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")


def add_demo(made: argparse.ArgumentParser) -> None:
    """One prompt, greedy, then samples of one long prompt: text, agreement, first-token time and tokens/s of both."""
    made.add_argument(
        "model", type=checkpoint, nargs="?", default=str(SHIPPED), help="hub id or path (default: the shipped checkpoint)"
    )
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--prompt", default=PROMPT, help="text to continue in the first part")
    made.add_argument("--new-tokens", type=positive, default=64, help="new tokens in the first part")
    made.add_argument("--samples", type=positive, default=8, help="samples of one prompt in the second part")
    made.add_argument("--prompt-tokens", type=positive, default=1000, help="prompt length in the second part")
    made.add_argument("--sample-tokens", type=positive, default=32, help="new tokens of each sample")
    made.add_argument("--repeats", type=positive, default=3, help="timed runs of each (one, if they are slow)")


def _add_accuracy(made: argparse.ArgumentParser, windows: int) -> None:
    _add_model(made)
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
    made.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="patch with this kv_dtype, and compare with stock over a cache that rounds keys and values alike",
    )


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
    _add_model(made)
    made.add_argument("--evaluations", nargs="+", choices=EVALUATED, default=list(EVALUATED), help="only these")
    made.add_argument("--quick", action="store_true", help="on a set small enough to look at after every change")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--output", type=Path, help="folder for the reports")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_faults(made: argparse.ArgumentParser) -> None:
    """The evaluations with each fault, which two must notice, and over seeds without one. Exits with 1 if one is wrong."""
    made.add_argument("--seeds", type=int, default=20)
    known = (*FAULTS, *ROUTING_FAULTS, *STEP_FAULTS)
    made.add_argument("--faults", nargs="*", choices=known, default=[*FAULTS, *STEP_FAULTS])
    made.add_argument("--evaluations", nargs="+", choices=EVALUATED, default=list(EVALUATED), help="only these")
    made.add_argument("--context", type=int, default=256)
    made.add_argument("--stride", type=int, default=64)
    made.add_argument("--windows", type=int, help=f"windows a run; default {WINDOWS_32} in float32, {WINDOWS_16} in 16 bits")
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--model", type=checkpoint, help="hub id or path of a Llama (default: the shipped checkpoint)")
    made.add_argument("--variant", action="append", help="as for perplexity; repeatable")
    made.add_argument("--output", type=Path, help="folder for faults.md, faults.json and faults.png")
    made.add_argument("--quiet", action="store_true")


def add_streaming(made: argparse.ArgumentParser) -> None:
    """Perplexity of a long stream with sinks and a window, without sinks, and encoded again; time and memory of generation.
    Exits with 1 if streaming is more than 3% above encoding again."""
    _add_model(made)
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


def add_generate(made: argparse.ArgumentParser) -> None:
    """Whole calls of generate(), stock and patched in turn, once both are seen to compute the same. Exits with 1 if a case
    is wrong, falls back to Transformers' own path, or fails."""
    _add_model(made)
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
    made.add_argument(
        "--variants", action="store_true", help="variants of attention instead, against plain and compiled FlexAttention"
    )
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
    made.add_argument("--prompt", type=positive, default=4096, help="tokens of each")
    made.add_argument("--new", type=positive, default=64, help="tokens after the first that are timed")
    made.add_argument("--pairs", type=positive, default=2, help="interleaved rounds of generate()")
    made.add_argument("--kv-dtype", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), help="formats (default: all)")
    made.add_argument("--output", type=Path, help="folder for eight-bits.md and .json")


def add_warmup(made: argparse.ArgumentParser) -> None:
    """Compile ahead, in several processes, what generate() needs for batches and prompts of these sizes, greedy and sampled.
    Only the model's configuration is read; what is compiled stays in Triton's cache on this machine."""
    made.add_argument("model", type=checkpoint, nargs="?", default=str(SHIPPED), help="hub id or path")
    made.add_argument("--batch", type=positive, nargs="+", default=[1], help="rows, samples and beams counted (default: 1)")
    made.add_argument("--prompt", type=positive, nargs="+", default=[512], help="tokens of a prompt (default: 512)")
    made.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights (default: the checkpoint's)"
    )
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--workers", type=positive, help="processes at once (default: one a core, at most 8)")


def add_serve(made: argparse.ArgumentParser) -> None:
    """`transformers serve` with every model patched that it loads. Model and all other options are those of `transformers
    serve` (its `--help` lists them); `--continuous-batching` has requests share the steps of one running batch."""
    made.add_argument("--patch", default="", metavar="OPTION=VALUE,...", help="options of patch()")


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
    most = "prompt tokens of all rows up to which stock, and ours without sharing, run too (default: %(default)s)"
    made.add_argument("--most", type=positive, default=2**18, help=most)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for parallel.md, .json and .png")


def above_zero(text: str) -> float:
    """A number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


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
    attention = "of stock's generate_batch() (default: the quickest of those that are there)"
    made.add_argument("--attention", help=attention)
    rates = "of the load, as shares of what is done where all requests are there at once (default: %(default)s)"
    made.add_argument("--rates", type=above_zero, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help=rates)
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU, else float32")
    made.add_argument("--device", help="PyTorch's name of it (default: cuda if there is one, else cpu)")
    made.add_argument("--output", type=Path, help="folder for batching.md, .json and .png")


def add_report(made: argparse.ArgumentParser) -> None:
    """One HTML page from everything that evaluations and benchmarks wrote into a folder. Exits with 1 if a record is red."""
    made.add_argument(
        "results", type=Path, nargs="?", default=SHIPPED.parents[1] / "results", help="folder (default: the project's own)"
    )
    made.add_argument("--output", type=Path, default=Path("report.html"), help="the file (default: %(default)s)")


def add_recall(made: argparse.ArgumentParser) -> None:
    """What stock and patched find again in long contexts, by length and depth: needles, pairs to look up, chains of
    variables. Exits with 1 if they differ by more than chance."""
    _add_model(made)
    made.add_argument("--tasks", nargs="+", choices=RECALLED, default=list(RECALLED[:3]), help="only these")
    made.add_argument("--lengths", type=positive, nargs="+", help="tokens of a context (default: by the device)")
    made.add_argument("--depths", type=share, nargs="+", help="of what is asked for, 0 the start (default: by the device)")
    made.add_argument("--count", type=positive, help="prompts of each length and depth (default: 48 on a GPU, else 6)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--inject", choices=FAULTS[:4], help="plant this fault in the patched model; the verdict must be red")
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
    made.add_argument("--output", type=Path, help="folder for sampling.md, .json and .png")
    made.add_argument("--quiet", action="store_true", help="no progress bar")


def add_tasks(made: argparse.ArgumentParser) -> None:
    """Tasks of lm-evaluation-harness: scores of stock and patched with standard errors, and how answers differ. Exits with
    1 if they differ by more than rounding makes them, or a request ran another way than ours."""
    _add_model(made)
    made.add_argument("--tasks", nargs="+", help="of the harness (default: those that come with the project)")
    made.add_argument("--include-path", nargs="+", help="folders with further tasks")
    made.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    made.add_argument("--limit", type=positive, help="documents of each task, at most")
    made.add_argument("--batch", type=positive, default=8, help="the harness's batch size (default: %(default)s)")
    made.add_argument("--output", type=Path, help="folder for tasks.md, .json and .png")
    made.add_argument("--quiet", action="store_true", help="no messages of the harness")


def add_lm_eval(made: argparse.ArgumentParser) -> None:
    """lm-evaluation-harness's own command with `--model hf-fastattn`, which is the default. All options are the harness's
    (`lm_eval run --help` lists them)."""


def add_task_speed(made: argparse.ArgumentParser) -> None:
    """lm-evaluation-harness's requests, answered by its own `HFLM` and by `FastLM` on a patched model in turn. Exits with 1
    if ours is slower, computes a token twice, or leaves its own path."""
    _add_model(made)
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


class Command(NamedTuple):
    """A command: the module whose `main(argv)` runs it, one line of help, what adds its options, and whether it hands on
    options that it does not know."""

    module: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    hands_on: bool = False


COMMANDS = {
    "demo": Command(
        "hf_fastattn.eval.demo", "generate with stock Transformers and with the patched model, side by side", add_demo
    ),
    "warmup": Command("hf_fastattn.eval.warmup", "compile ahead what generate() needs for a model", add_warmup),
    "serve": Command("hf_fastattn.eval.serve", "transformers serve, with patched models", add_serve, hands_on=True),
    "lm-eval": Command(
        "hf_fastattn.eval.harness_command", "lm-evaluation-harness, with patched models", add_lm_eval, hands_on=True
    ),
    "report": Command("hf_fastattn.eval.report_page", "one HTML page from all results", add_report),
    "eval perplexity": Command(
        "hf_fastattn.eval.perplexity", "perplexity of both on the same tokens, and the paired difference", add_perplexity
    ),
    "eval parity": Command("hf_fastattn.eval.parity", "logits and hidden states of both against the exact ones", add_parity),
    "eval logprobs": Command(
        "hf_fastattn.eval.logprobs", "what generate() says of its tokens against a later forward of them", add_logprobs
    ),
    "eval all": Command("hf_fastattn.eval.all_evaluations", "all evaluations of accuracy, and their verdicts", add_all),
    "eval faults": Command("hf_fastattn.eval.fault_table", "plant faults that the two evaluations must notice", add_faults),
    "eval recall": Command(
        "hf_fastattn.eval.recall", "what both find again in long contexts, by length and depth", add_recall
    ),
    "eval sampling": Command(
        "hf_fastattn.eval.sampling", "whether drawn tokens follow stock's distribution, and are independent", add_sampling
    ),
    "eval tasks": Command(
        "hf_fastattn.eval.tasks", "scores of both in tasks of lm-evaluation-harness, and paired differences", add_tasks
    ),
    "eval streaming": Command(
        "hf_fastattn.eval.streaming", "perplexity, time and memory of generation without end", add_streaming
    ),
    "bench generate": Command(
        "hf_fastattn.eval.speed", "time generate() of stock Transformers and of the patched model in pairs", add_generate
    ),
    "bench matrix": Command(
        "hf_fastattn.eval.matrix",
        "time every kind of call, family and state on small models, and name what is slower",
        add_matrix,
    ),
    "bench rollouts": Command(
        "hf_fastattn.eval.rollouts", "time generate() as trainers call it, GRPO's rollouts", add_rollouts
    ),
    "bench parallel": Command(
        "hf_fastattn.eval.parallel",
        "time calls whose rows, or which themselves, begin alike, with and without sharing",
        add_parallel,
    ),
    "bench batching": Command(
        "hf_fastattn.eval.batching",
        "time requests of different lengths, all at once and arriving: generate_batch() and padded generate()",
        add_batching,
    ),
    "bench tasks": Command(
        "hf_fastattn.eval.task_speed", "time lm-evaluation-harness's requests, stock and patched", add_task_speed
    ),
    "bench attention": Command(
        "hf_fastattn.eval.attention", "time the kernels against PyTorch's, FlashInfer's and ceilings", add_attention
    ),
    "bench eight-bits": Command(
        "hf_fastattn.eval.eight_bits", "time and measure keys and values in 8 bits against 16", add_eight_bits
    ),
    "bench experts": Command(
        "hf_fastattn.eval.experts", "time the kernels of experts against PyTorch's and ceilings", add_experts
    ),
}


def parser(name: str) -> Parser:
    """The parser of one command, by its name in COMMANDS."""
    add_options = COMMANDS[name].add_options
    made = Parser(prog=f"hf-fastattn {name}", description=add_options.__doc__)
    add_options(made)
    return made
