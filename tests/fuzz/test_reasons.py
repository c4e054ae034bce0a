"""Each reason of the closed list is needed: a minimal program brings it up, and does what stock does."""

from __future__ import annotations

import re

import pytest

from tests.fuzz.reasons import FOREIGN, PLAIN, Reason, call, unknown_reasons
from tests.fuzz.run import run_program


@pytest.mark.parametrize("reason", [one for one in PLAIN + FOREIGN if one.steps], ids=lambda reason: reason.pattern[:60])
def test_the_reason_is_counted_and_stock_does_the_same(reason: Reason) -> None:
    result = run_program(reason.program())
    assert result.problem is None and not result.errors
    counted = [name for path in result.paths for name in path["fallbacks"]]
    assert any(re.fullmatch(reason.pattern, name) for name in counted), counted


def test_an_unknown_reason_is_a_fault() -> None:
    program = Reason("", (call(),)).program()
    assert unknown_reasons(program, 0, {"attention weights are asked for": 1}) is None
    assert unknown_reasons(program, 0, {"attention weights are asked for": 1, "nobody knows": 1}) is not None
    # What hooks are the reason for is none without hooks.
    assert unknown_reasons(program, 0, {"padding stays: a LlamaMLP has hooks": 1}) is not None


def test_a_plain_call_has_no_reason_at_all() -> None:
    result = run_program(Reason("", (call(pad="left", prompt={"equal": True}),)).program())
    assert result.problem is None and result.paths[0]["fallbacks"] == {} and result.paths[0]["forwards"] > 0
