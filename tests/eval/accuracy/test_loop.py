"""Evaluations in the device's loop: green without a fault, red with one, and red if the loop did not run."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import fault_table, models
from hf_fastattn.eval.accuracy import draw_costs, faults, loop_feed, texts, variants, windows
from hf_fastattn.eval.choices import STEP_FAULTS
from hf_fastattn.loop.loop_graphs import LoopGraphs
from tests.eval.reduced import SMALL

LAYERS = 3
TOGETHER = ["--variant", "backend=reference,loop=on,share=on"]
ALONE = ["--variant", "backend=reference,loop=on,alone=on"]
OPTIONS = {"perplexity": [], "parity": ["--new", "6"], "logprobs": ["--new", "6", "--samples", "3"]}
MIXTURE = ["--model", str(models.MIXTURE)]


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_faults_in_steps_are_caught_by_two_evaluations(fault: str) -> None:
    model = MIXTURE if fault == "step-expert" else []
    names = ["perplexity", "logprobs"]
    if fault == "step-suffix":
        # The page behind the prefix has to be full before it can be read in place of another.
        model = ["--new", "20"]
    if fault == "step-sampler":
        # Tokens that only a wrong threshold lets through are rare.
        names, model = ["parity", "logprobs"], ["--windows", "4", "--batch", "4", "--new", "20"]
    rows = []
    for name in names:
        own = model if name != "perplexity" or fault != "step-suffix" else []
        record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *TOGETHER, *own, "--inject", fault])
        assert record["verdict"] == "red" and record["planted"] > 0, name
        rows.append(fault_table.row(name, record, fault, 0, None))
        # Quiet faults: numbers that are wrong, not NaN, in the loop that was asked for.
        assert fault_table.caught(rows[-1]), rows[-1]
        alarms = [check for check in record["checks"] if check["alarms"]]
        assert all(check["value"] == check["value"] and check["limit"] > 0 for check in alarms)
    assert fault_table.missed(rows) == [] and len(rows) >= 2
    assert fault_table.missed(rows[:1]) == [f"{fault} ({names[0]})"]


@pytest.mark.parametrize(("name", "fault"), [("perplexity", "step-page"), ("logprobs", "step-page"), ("parity", None)])
def test_rows_alone(name: str, fault: str | None) -> None:
    """Each in a call of its own, whose steps are of one row; what that row's page table says is seen."""
    record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *ALONE, *(["--inject", fault] if fault else [])])
    found = fault_table.row(name, record, fault or "", 0, None)
    assert record["verdict"] == ("red" if fault else "green") and fault_table.caught(found) == bool(fault)
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["batches whose rows were not alone in their steps"]["value"] == 0
    assert "batches whose prefixes were read row by row" not in checks
    # A call for each window; of parity a greedy and a drawn one too, of logprobs one for each answer, and a drawn one.
    calls = {"perplexity": 2, "parity": 6, "logprobs": 2 * 3 + 2}[name]
    assert f"| {calls} calls | 1 |" in record["paths"][-1]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("more", [MIXTURE, ["--window", "48"]])
def test_no_alarm_without_a_fault(name: str, more: list[str]) -> None:
    record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *TOGETHER, *more])
    assert record["verdict"] == "green" and record["planted"] == 0


@pytest.mark.parametrize("name", ["perplexity", "logprobs"])
def test_red_if_the_loop_that_was_asked_for_did_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopGraphs, "why_not_here", lambda self, model, cache: "of no reason")
    record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *TOGETHER])
    assert record["verdict"] == "red"
    alarms = [check for check in record["checks"] if check["alarms"]]
    assert {check["limit"] for check in alarms} == {0}
    assert any(check["name"] == "batches off the device's loop" and check["note"] == "of no reason" for check in alarms)
    assert any("**not looked at**" in line and "of no reason" in line for line in record["paths"])


def test_faults_in_hooks_are_planted_where_hooks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.load(str(models.SHIPPED), torch.float32, "cpu")
    every = variants.chosen(None, model)
    assert {variant.loop for variant in every} == {True, False}
    assert any(dict(variant.options).get("prefix_cache") for variant in every)
    assert not any(variant.loop for variant in variants.chosen(None, model, "scale"))
    assert [variant.name for variant in variants.chosen(None, model, "step-slot")] == [TOGETHER[1]]
    both = [variants.parse(one[1]) for one in (TOGETHER, ALONE)]
    monkeypatch.setattr(variants, "default_variants", lambda model: both)
    assert variants.chosen(None, model, "step-slot") == both
    assert variants.chosen(None, model, "step-suffix") == variants.chosen(None, model, "step-prefix") == both[:1]
    with hf_fastattn.patched(model):
        with pytest.raises(ValueError, match="leave out the layer"), faults.planted(model, "step-slot", 3):
            pass
        with pytest.raises(ValueError, match="no experts"), faults.planted(model, "step-expert"):
            pass


def test_rows_are_over_one_after_the_other_and_the_end_is_no_token_of_theirs() -> None:
    model, tokenizer = models.load(str(models.SHIPPED), torch.float32, "cpu")
    chosen = windows.choose(texts.documents(), tokenizer, context=64, stride=24, count=3, seed=4)
    batch = windows.batches(chosen, 3, pad=2)[0]
    with hf_fastattn.patched(model), loop_feed.exercised(model):
        scores = loop_feed.forced_scores(model, batch, share=True)
        keys = model._fastattn.runtime.loop_graphs.recorded
    assert [len(row) for row in scores.logprobs] == [window.scored for window in batch.windows]
    assert all(bool(row.isfinite().all()) for row in scores.logprobs)
    assert len({key.rows for key in keys}) > 1 and all(key.forced for key in keys)
    few = windows.WindowBatch(batch.windows, torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="none is left to end rows"):
        loop_feed._unused(few, 3)


@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_of_the_exact_distribution_cost_what_they_should(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 32, generator=generator, dtype=torch.float64) * 2
    kept = logits.masked_fill(logits < logits.topk(top_k or 32, -1).values[:, -1:], -torch.inf)
    tokens = torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]

    def deviations(drawn: torch.Tensor) -> tuple[float, float]:
        checks = draw_costs.draw_checks("ours", [draw_costs.draw_figures(logits, drawn, top_k)], 1e-6)
        return checks[0].value, checks[1].value

    cost, outside = deviations(tokens)
    assert cost < 3 and outside == 0
    # The likeliest tokens cost too little, and those of a warmer distribution too much or are not to be drawn.
    assert deviations(logits.argmax(-1))[0] > 10
    warm = torch.multinomial((logits / 1.5).softmax(-1), 1, generator=generator)[:, 0]
    assert deviations(warm)[0] > 10 or deviations(warm)[1] > 1
