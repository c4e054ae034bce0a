"""The `hf-fastattn` command: `demo`, `serve`, the accuracy evaluations as `eval ...`, the benchmarks as `bench ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hf_fastattn.eval.arguments import COMMANDS, Parser
from hf_fastattn.version import __version__

GROUPS = {
    "eval": "compare the patched model with stock: perplexity, parity, families, faults, recall, sampling, tasks, streaming",
    "bench": "time it: generate, matrix, rollouts, parallel, batching, tasks, attention, eight-bits, experts",
}


def parser() -> Parser:
    """All commands with their options; `command` is the one chosen, or None, and then `shown` the parser to ask for more."""
    top = Parser(prog="hf-fastattn", description="Fast generate() for Transformers: a demo, evaluations and benchmarks.")
    top.add_argument("--version", action="version", version=f"hf-fastattn {__version__}")
    top.set_defaults(command=None, shown=top)
    places = {"": top.add_subparsers(title="commands", metavar="COMMAND")}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in places:
            made = places[""].add_parser(group, help=GROUPS[group], description=f"To {GROUPS[group]}.")
            made.set_defaults(shown=made)
            places[group] = made.add_subparsers(title="commands", metavar="COMMAND")
        leaf = places[group].add_parser(word, help=command.summary, description=command.add_options.__doc__)
        leaf.set_defaults(command=name)
        command.add_options(leaf)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (default: the process's arguments) begins with; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    top = parser()
    arguments, others = top.parse_known_args(words)
    if arguments.command is None:
        arguments.shown.exit(2, arguments.shown.format_help())
    if others and not COMMANDS[arguments.command].hands_on:
        top.error(f"unrecognized arguments: {' '.join(others)}")
    # The module takes seconds to import: only once its options are known to be right.
    module = importlib.import_module(COMMANDS[arguments.command].module)
    return module.main(words[len(arguments.command.split()) :])


if __name__ == "__main__":
    raise SystemExit(main())
