"""All evaluations by one command: each runs with its sizes and the common options, and one red verdict makes all red."""

from __future__ import annotations

from typing import Any

import pytest

from hf_fastattn import cli
from hf_fastattn.eval import all_evaluations, logprobs, parity, perplexity
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.choices import EVALUATED, QUICK
from hf_fastattn.eval.fault_table import EVALUATIONS

MODULES: dict[str, Any] = {"perplexity": perplexity, "parity": parity, "logprobs": logprobs}


@pytest.mark.parametrize("red", [None, "parity"])
def test_one_red_verdict_makes_all_red(red: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: dict[str, list[str]] = {}
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "main", lambda argv, name=name: (asked.update({name: argv}), int(name == red))[1])
    assert cli.main(["eval", "all", "--quick", "--device", "cpu", "--quiet"]) == int(red is not None)
    assert list(asked) == list(EVALUATED)
    for name, argv in asked.items():
        # Each takes what it is given.
        parsed = parser(f"eval {name}").parse(argv)
        assert parsed.device == "cpu" and parsed.quiet and parsed.windows == 4
        assert argv[: len(QUICK[name])] == list(QUICK[name])
    shown = capsys.readouterr().out
    assert f"| parity | {'red' if red else 'green'} | 0 |" in shown and "| all | |" in shown


def test_every_evaluation_is_held_against_faults() -> None:
    assert set(EVALUATED) == set(EVALUATIONS) and set(QUICK) <= set(EVALUATED)
    assert all_evaluations.table([]).endswith("| all | | 0 |")
