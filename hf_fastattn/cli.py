"""The `hf-fastattn` command: `demo`, the accuracy evaluations as `eval ...`, the benchmarks as `bench ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: (module with a `main(argv) -> int`, one line of help); modules load only when their command runs.
COMMANDS = {
    "demo": ("hf_fastattn.eval.demo", "generate with stock Transformers and with the patched model, side by side"),
    "eval perplexity": ("hf_fastattn.eval.perplexity", "perplexity of both on the same tokens, and the paired difference"),
    "eval parity": ("hf_fastattn.eval.parity", "logits and hidden states of both against the exact ones"),
    "eval faults": ("hf_fastattn.eval.fault_table", "plant faults that the two evaluations must notice"),
    "bench generate": ("hf_fastattn.eval.speed", "time generate() of stock Transformers and of the patched model in pairs"),
    "bench attention": ("hf_fastattn.eval.attention", "time the kernels against PyTorch's, FlashInfer's and ceilings"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named first in `argv` (default: the process's arguments); returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        words[:2] = [" ".join(words[:2])]
    listing = "\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-fastattn",
        description=f"commands:\n{listing}\n\n`hf-fastattn COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to the command")
    arguments = parser.parse_args(words)
    module = importlib.import_module(COMMANDS[arguments.command][0])
    return module.main(arguments.options)


if __name__ == "__main__":
    raise SystemExit(main())
