"""The batching benchmark: every case runs on a tiny model; faults are red, and what was not timed is scaled and said."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig

import hf_fastattn
from hf_fastattn import cli
from hf_fastattn.batching.requests import Request
from hf_fastattn.eval import batching
from hf_fastattn.eval.batching_calls import figures, ways
from hf_fastattn.eval.batching_calls.cases import ON_CPU, ON_GPU, Ask, Case, arriving
from hf_fastattn.eval.batching_calls.padded import Padded
from hf_fastattn.eval.batching_calls.plot import COLOURS
from hf_fastattn.eval.batching_calls.served import Served, serve
from hf_fastattn.eval.batching_calls.steady import steady
from hf_fastattn.eval.batching_calls.table import NAMES, aimed
from hf_fastattn.eval.choices import BATCHING, SERVED, SHAPES
from hf_fastattn.eval.shapes import random_model
from tests.tools.models import COMMON

TINY = {**COMMON, "model_type": "llama"}
OURS = ("ours", "stock_padded", "patched_padded")
SMALL_POOL = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
FALLS_BACK = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, scheduler_type="prefill_first")
SMALL = ("--shape", "llama-3-8b", "--device", "cpu", "--requests", "3", "--most-new", "5", "--pairs", "1", "--rates", "1")


def run(output: Path, *arguments: str, system: tuple[str, ...] = OURS) -> tuple[int, dict[str, Any], str]:
    given = [*SMALL, "--system", *system, *arguments, "--output", str(output)]
    status = cli.main(["bench", "batching", *given])
    return status, json.loads((output / "batching.json").read_text()), (output / "batching.md").read_text()


@pytest.fixture(autouse=True)
def tiny_and_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-3-8b", TINY)
    monkeypatch.setitem(batching.SLOWER, "cpu", float("inf"))
    monkeypatch.setitem(ON_CPU, "arrival", dataclasses.replace(ON_CPU["arrival"], long_prompt=300))


def test_all_cases(tmp_path: Path) -> None:
    status, record, table = run(tmp_path)
    assert status == 0 and not record["failed"]
    assert [row["name"] for row in record["cases"]] == list(BATCHING) == list(ON_CPU) == list(ON_GPU)
    for row in record["cases"]:
        assert f"| {row['name']} | patched `generate_batch` |" in table and f"- `{row['name']}`: " in table
        assert row["agrees"] and "are those of stock's generate()" in row["detail"]
        assert any("new tokens" in words for words in row["scaled"])
    held = {row["name"]: row["systems"] for row in record["cases"]}
    assert set(held["ragged"]) == set(OURS) and held["ragged"]["ours"]["gap_ms"]["median"] > 0
    assert held["arrival"]["ours"]["long_first_s"] > 0 and held["arrival"]["ours"]["slowest"] > 0
    assert [point["share"] for point in held["load"]["ours"]["points"]] == [None, 1.0]
    assert record["cases"][3]["whole_s"] == pytest.approx(0.512 * held["long"]["ours"]["gap_ms"]["median"])


def test_options_of_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    plain = hf_fastattn.patch
    monkeypatch.setattr(
        ways.hf_fastattn, "patch", lambda model, **options: (seen.append(options), plain(model, **options))[1]
    )
    status, record, table = run(tmp_path, "--case", "ragged", "--patch", "mixed_steps=on,page_size=32", system=("ours",))
    assert status == 0 and seen == [{"mixed_steps": True, "page_size": 32}]
    assert record["settings"]["patch"] in table and "patched with `mixed_steps=on,page_size=32`" in table
    with pytest.raises(SystemExit):
        run(tmp_path, "--case", "ragged", "--patch", "mixed=on", system=("ours",))
    assert "argument --patch: 'mixed=on'" in capsys.readouterr().err


def test_stock_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its running batches take the attention that is quickest here, and stop when time is up."""
    # By default they take a share of the memory, and seconds for it.
    monkeypatch.setattr(ways.Ways, "batching", lambda self, model: None if model is self.patched else SMALL_POOL)
    system = ("stock_batch", "stock_padded", "ours")
    status, record, table = run(tmp_path, "--case", "ragged", "--stock-new", "1", "--stock-batches", "1", system=system)
    found = record["cases"][0]["systems"]
    assert status == 0 and list(found) == ["stock_batch", "stock_padded", "ours"]
    assert found["stock_batch"]["said"] in (["sdpa"], ["eager"]) and found["stock_padded"]["said"] == ["3 rows", "scaled"]
    assert "ours / stock_batch" in table and record["cases"][0]["ratios"]["stock_batch"] > 0
    status, record, table = run(
        tmp_path, "--case", "ragged", "--stock-seconds", "0.01", "--attention", "eager", system=("stock_batch",)
    )
    assert status == 0 and "eager, at least: " in table


def test_other_tokens_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tokens = Request.set_tokens

    def wrong(self: Request, chosen: list[int], logprobs: list[float]) -> None:
        set_tokens(self, [1, *chosen[1:]], logprobs)

    monkeypatch.setattr(Request, "set_tokens", wrong)
    for dtype, words in (("float32", "are not stock's"), ("bfloat16", "miss the likeliest by")):
        status, record, table = run(tmp_path, "--case", "ragged", "--dtype", dtype)
        row = record["cases"][0]
        assert status == 1 and not row["agrees"] and words in row["red"][0]
        assert "**RED** ragged" in table and "not measured" in table
        line = next(line for line in table.splitlines() if line.startswith("| ragged | stock `generate`"))
        assert line.split("|")[6].strip() == ""


def test_16_bits_agree(tmp_path: Path) -> None:
    status, record, _ = run(tmp_path, "--case", "ragged", "--dtype", "bfloat16")
    assert status == 0 and "miss the likeliest by" in record["cases"][0]["detail"]


def test_what_is_slower_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.SLOWER, "cpu", 0.0)
    status, record, table = run(tmp_path, "--case", "ragged")
    assert status == 1 and "patched_padded takes" in record["cases"][0]["red"][0] and "**RED** ragged" in table


def test_what_falls_back_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "serve", functools.partial(serve, batching=FALLS_BACK))
    status, record, table = run(tmp_path, "--case", "load", system=("ours",))
    assert status == 1 and "fell back: continuous batching: scheduler_type='prefill_first'" in table.split("RED")[1]
    assert "0 of 3 requests were served in running batches" in record["cases"][0]["red"]


def test_a_case_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "check", None)
    status, record, table = run(tmp_path, "--case", "ragged", "outputs")
    assert status == 1 and [found["name"] for found in record["failed"]] == ["ragged", "outputs"]
    assert "**ragged failed**: TypeError" in table


def test_pages_that_are_kept_and_requests_that_were_not_served_are_problems() -> None:
    model = hf_fastattn.patch(random_model("llama-3-8b", "cpu", torch.float32))
    asks = [Ask([5, 6, 7], 3), Ask([8] * 20, 2)]
    served = serve(model, asks)
    assert not figures.problems(model, 2)
    assert [len(output.generated_tokens) for _, output in sorted(served.outputs.items())] == [3, 2]
    assert served.tokens == 5 and len(served.gaps) == 3 and len(served.waits) == 2 and not served.remaining
    assert figures.problems(model, 3) == ["2 of 3 requests were served in running batches"]


def test_requests_of_a_round() -> None:
    case = Case("offline", "", 8, (10, 20), (100, 400), log=True, midway=True)
    first, second = case.asks(50, 0), case.asks(50, 1)
    assert [len(ask.prompt) for ask in first] == [len(ask.prompt) for ask in second]
    assert [ask.new for ask in first] == [ask.new for ask in second] and first != second
    assert all(10 <= len(ask.prompt) <= 20 and 100 <= ask.new <= 400 for ask in first)
    small = case.limited(4, 40)
    assert (small.requests, small.new, small.whole, small.prompt) == (4, (10, 40), 400, (190, 200))
    assert len(small.said) == 3 and case.limited(None, None).said == ()
    times = [ask.arrival for ask in arriving(first * 100, 4.0)]
    assert times[0] == 0 and times == sorted(times) and times[-1] == pytest.approx(200, rel=0.2)


def test_padded_calls_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[int], int]] = []

    def timed(self: Padded, model: Any, asks: list[Ask], new: int) -> float:
        calls.append(([len(ask.prompt) for ask in asks], new))
        return 10.0 + 2.0 * (new - 1)

    monkeypatch.setattr(Padded, "_timed", timed)
    asks = [Ask([1] * length, new) for length, new in ((4, 9), (1, 3), (2, 7), (3, 5))]
    assert Padded(2).seconds(None, asks) == (10 + 2 * 6) + (10 + 2 * 8)
    assert calls == [([1, 2], 7), ([3, 4], 9)]
    assert Padded(2, most_new=2).seconds(None, asks) == (10 + 2 * 6) + (10 + 2 * 8)
    assert calls[2:] == [([1, 2], 1), ([1, 2], 3), ([3, 4], 1), ([3, 4], 3)]
    assert Padded(2, batches=1).seconds(None, asks) == 2 * (10 + 2 * 8)
    assert Padded(2, most_new=2).is_scaled(asks) and Padded(2, batches=1).is_scaled(asks)
    assert not Padded(2, most_new=8, batches=2).is_scaled(asks)


def test_steady_state() -> None:
    """Two rows over seconds 10 to 14, the shorter one until 12; a step a second."""
    model = random_model("llama-3-8b", "cpu", torch.float32)
    asks = [Ask([1] * 5, 5), Ask([1] * 3, 3)]

    def output(stamps: list[float] | None, end: float) -> Any:
        return SimpleNamespace(timestamps=stamps, lifespan=(9.0, end), created_time=9.0)

    served = Served(asks, outputs={0: output([10.0, 11.0, 12.0, 13.0, 14.0], 14.0), 1: output(None, 12.0)})
    state = steady(model, served, 1e9)
    # Half of the rows have ended at the end of the second one.
    assert state is not None and (state.seconds, state.steps, state.rows) == (4.0, 4, 1.5)
    a_token = 3 * 2 * 2 * 16 * 4
    head = model.get_output_embeddings().weight.nbytes
    weights = head + sum(one.nbytes for one in model.model.layers.parameters()) + model.model.norm.weight.nbytes
    # Keys and values of the tokens before each step's, and of its own: 6 to 9, and 4 and 5.
    assert state.limit is not None and state.limit == pytest.approx((4 * weights + a_token * (6 + 7 + 8 + 9 + 4 + 5)) / 1e9)
    assert state.share == pytest.approx(state.limit / 4)
    assert steady(model, served, None).share is None  # type: ignore[union-attr]


def test_gaps_beside_a_long_prompt() -> None:
    def output(*stamps: float, came: float = 0.0) -> Any:
        return SimpleNamespace(timestamps=list(stamps), created_time=came)

    asks = [Ask([1], 6), Ask([1], 6), Ask([1] * 9, 1, after=(0, 2))]
    row = (1.0, 2.0, 3.0, 4.0, 7.0, 10.0, 11.0)
    served = Served(asks, outputs={0: output(*row), 1: output(*row), 2: output(9.5, came=3.5)})
    found = figures.arrival_figures(served)
    assert found["alone_ms"]["median"] == 1000 and found["long_first_s"] == 6
    # The gap in which it came counts too.
    assert found["beside_ms"]["median"] == 3000 and found["slowest"] == pytest.approx(3, rel=0.01)


def test_aims() -> None:
    ours = {"seconds": 1.0, "steady": {"share": 0.7}, "slowest": None}
    aims = {"ours / stock_batch": 0.1, "share": 0.65, "slowest": 3, "whole_s": 100}
    row = {"aims": aims, "systems": {"ours": ours}, "ratios": {"stock_batch": 0.2}, "whole_s": 90.0}
    assert {name: reached for name, (_, reached) in aimed(row).items()} == {
        "ours / stock_batch": False, "share": True, "slowest": None, "whole_s": True
    }  # fmt: skip
    assert set(NAMES) == set(COLOURS) == set(SERVED)
