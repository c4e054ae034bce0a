"""The options of every command, without PyTorch, so that help and mistakes are answered at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from hf_fastattn.eval.choices import DTYPES, SHIPPED
from hf_fastattn.eval.command_line.accuracy import (
    add_all,
    add_families,
    add_faults,
    add_lm_eval,
    add_logprobs,
    add_parity,
    add_perplexity,
    add_recall,
    add_report,
    add_sampling,
    add_streaming,
    add_tasks,
)
from hf_fastattn.eval.command_line.speed import (
    add_attention,
    add_batching,
    add_eight_bits,
    add_experts,
    add_generate,
    add_matrix,
    add_parallel,
    add_rollouts,
    add_task_speed,
)
from hf_fastattn.eval.command_line.values import checkpoint, positive

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
    "eval families": Command(
        "hf_fastattn.eval.families", "perplexity and parity of a small random model of every family", add_families
    ),
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
