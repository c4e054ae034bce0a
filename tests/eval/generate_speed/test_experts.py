"""The experts that steps read: counted on the device, and what the benchmark says where rows route alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn import cli
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import agreement
from hf_fastattn.eval.generate_speed import bench as bench_module
from hf_fastattn.eval.generate_speed.bench import Bench
from hf_fastattn.eval.generate_speed.experts import Distinct, counting, expected_experts, experts_of
from hf_fastattn.eval.generate_speed.systems import twin_without_switch
from tests.tools.fused_layers import steps
from tests.tools.models import VOCAB, tiny

SIZE = ["--batch", "4", "--prompt", "24", "--new", "4", "--pairs", "1"]


def mixture(alike: bool = False, **over: Any) -> Any:
    """A model of 9 experts a layer, 2 a token; `alike`: its tokens are all one to the router."""
    model = tiny("qwen3_moe", num_experts=9, **over)
    if alike:
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            table[:] = table[5]
    return model


def test_a_share_is_comparable() -> None:
    assert Distinct(6.3, 5.0, 7.0).comparable and not Distinct(6.2, 6.1, 7.0).comparable
    assert not Distinct(0.0, 0.0, 2.0).comparable
    assert experts_of(tiny("llama")) is None and experts_of(mixture()) == (9, 2) and experts_of(tiny("mixtral")) == (4, 2)
    assert Distinct(6.3, 5.0, 7.0).record() == {"counted": 6.3, "least": 5.0, "expected": 7.0, "comparable": True}


def test_a_twin_that_does_not_switch_is_stock_otherwise() -> None:
    model = mixture()
    other = twin_without_switch(model)
    ids = torch.arange(8)[None]
    assert torch.equal(*(one.generate(ids, max_new_tokens=4, do_sample=False) for one in (model, other)))
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("alike", [False, True])
def test_counted(alike: bool) -> None:
    model = hf_fastattn.patch(mixture(alike, num_hidden_layers=2, initializer_range=0.1))
    ids = torch.randint(1, VOCAB, (4, 5), generator=torch.Generator().manual_seed(2))
    with counting(torch.device("cpu"), 4) as sums:
        steps(model, ids, None, [3, 4, 5], hf_fastattn.PagedCache(model.config))
    # A prompt of twelve tokens is no step.
    assert sums[1].tolist()[:3] == [2, 2, 0]
    with torch.no_grad():
        logits = hf_fastattn.unpatch(model)(ids, output_router_logits=True).router_logits
    chosen = [layer.view(4, 5, 9)[:, 3:].topk(2).indices for layer in logits]
    want = [sum(len(part[:, step].unique()) for step in range(2)) for part in chosen]
    assert sums[0, :2].tolist() == want
    assert (sum(want) / 4 < 0.9 * expected_experts(9, 2, 4)) == alike


@pytest.mark.interpreter
def test_rehearsals_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fastattn.patch(mixture(num_hidden_layers=1))
    monkeypatch.setattr("hf_fastattn.kernels.rehearsal.is_under_way", lambda: True)
    with counting(torch.device("cpu"), 4) as sums:
        steps(model, torch.ones(4, 4, dtype=torch.long), None, [3, 4], hf_fastattn.PagedCache(model.config))
    assert not sums.any()


def bench(folder: Path, output: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    status = cli.main(["bench", "generate", "--model", str(folder), *SIZE, *options, "--output", str(output)])
    return status, json.loads((output / "speed.json").read_text()), (output / "speed.md").read_text()


@pytest.mark.parametrize("counted", [5.5, 4.0, 0.0])
def test_rows_that_route_alike_show_no_ratio(counted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Distinct(counted, counted - 0.1, expected_experts(9, 2, 4))
    monkeypatch.setattr(Bench, "_distinct", lambda self, case: found)
    mixture().save_pretrained(tmp_path)
    status, record, text = bench(tmp_path, tmp_path, "--device", "cpu", "--dtype", "float32")
    (row,) = record["cases"]
    assert (status == 0) == found.comparable == bool(row["ratios"])
    assert row["experts"]["counted"] == counted
    assert ("not comparable" in text.split("### Distinct experts")[0]) == (not found.comparable)
    assert f"| {counted:.1f} | {counted - 0.1:.1f} | {found.expected:.1f} |" in text
    assert bool(row["problems"]) == (not counted)


@pytest.mark.gpu
@pytest.mark.parametrize("alike", [False, True])
def test_counted_in_captured_steps(alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture(alike, initializer_range=0.1).save_pretrained(tmp_path)
    monkeypatch.setattr(bench_module, "FIRST_TOKENS", 4)
    status, record, _ = bench(tmp_path, tmp_path, "--dtype", "float32")
    (row,) = record["cases"]
    assert row["agrees"] and not row["problems"] and row["counters"]["fast_loops"] == 1
    assert (status == 0) == row["experts"]["comparable"] == (not alike)
    assert list(row["systems"]) == ["stock", "grouped_mm", "patched"]
    assert row["experts"]["least"] <= row["experts"]["counted"] <= 9


def test_what_is_too_large_to_be_checked_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*given: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    model = mixture()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(models, "_cast", lambda model, dtype: too_large(model, dtype) if dtype == torch.float64 else None)
        with models.in_precision(model, torch.float64):
            pass
    assert model.config._experts_implementation != "eager" and "forward" not in vars(model.model.norm)
    monkeypatch.setattr(agreement.Agreement, "__call__", too_large)
    model.save_pretrained(tmp_path)
    status, record, text = bench(tmp_path, tmp_path, "--device", "cpu", "--dtype", "float32")
    assert status == 1 and not record["failed"] and "not checked: the weights do not fit" in text
