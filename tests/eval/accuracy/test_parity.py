"""Parity: green without a fault, red with one, and the first wrong layer and token are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import fault_table, models, parity
from hf_fastattn.eval.accuracy import parity_errors, parity_greedy, texts, windows
from hf_fastattn.eval.accuracy.feed import Schedule, in_pieces, whole
from hf_fastattn.eval.accuracy.layer_tap import LayerTap
from tests.eval.reduced import PLAIN, SMALL

FEW = [*SMALL, "--new", "6"]


@pytest.mark.parametrize(("fault", "layer"), [("scale", 3), ("page", 5), ("position", 2)])
def test_names_the_first_wrong_layer(fault: str, layer: int) -> None:
    record = fault_table.evaluate("parity", [*FEW, *PLAIN, "--inject", fault, "--layer", str(layer)])
    assert record["verdict"] == "red"
    (place,) = record["first_wrong"].values()
    assert place.startswith(f"layer {layer}, token ")
    clean = [row for row in record["series"] if row["series"] == "stock"][0]["layer_rms"]
    ours = [row for row in record["series"] if row["series"] == PLAIN[1]][0]["layer_rms"]
    assert ours[:layer] == pytest.approx(clean[:layer], rel=0.2) and ours[layer] > 10 * clean[layer]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return models.load(str(models.SHIPPED), torch.float32, "cpu")


@pytest.fixture
def batch(loaded: tuple[Any, Any]) -> windows.WindowBatch:
    chosen = windows.choose(texts.documents(), loaded[1], context=64, stride=24, count=3, seed=4)
    return windows.batches(chosen, 3, pad=2)[0]


@pytest.mark.parametrize("share", [False, True])
def test_tap_sees_packed_and_padded_layers_alike(loaded: tuple[Any, Any], batch: windows.WindowBatch, share: bool) -> None:
    model = loaded[0]
    with LayerTap(model) as tap:
        whole(model, batch, 1)
        want = tap.take(batch.mask)
    assert not bool(want[:, ~batch.mask].any())
    got, done = [], 0
    with hf_fastattn.patched(model), LayerTap(model) as tap:
        for piece in in_pieces(model, batch, Schedule(8, 3, 4), keep=1, share=share, generate=False):
            copies = 2 if share and done else 1
            got.append(tap.take(batch.mask[:, done : piece.last].repeat_interleave(copies, 0))[:, ::copies])
            done = piece.last
    torch.testing.assert_close(torch.cat(got, 2), want, atol=2e-4, rtol=1e-4)


def test_first_beyond_takes_the_lowest_layer_then_the_earliest_token(batch: windows.WindowBatch) -> None:
    errors = torch.zeros(3, *batch.ids.shape)
    assert parity_errors.first_beyond(errors, torch.full((3,), 1e-3), batch) is None
    width = batch.ids.shape[1]
    errors[2, 0, 5] = 1.0
    errors[1, 2, width - 1] = 1.0
    errors[1, 1, width - 2] = float("nan")
    place = parity_errors.first_beyond(errors, torch.full((3,), 1e-3), batch)
    assert place is not None and (place["layer"], place["row"], place["column"]) == (1, 1, width - 2)


def test_logit_errors() -> None:
    true = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.9, 0.0]], dtype=torch.float64)
    ours = true + torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.3, 0.0]])
    figures = parity_errors.row_errors(ours, true)
    assert figures["max"] == pytest.approx(0.5) and figures["agree"] == 1
    assert figures["regret"] == pytest.approx(0.1)
    kl = torch.nn.functional.kl_div(ours.log_softmax(-1), true.softmax(-1), reduction="sum").item()
    assert figures["kl"] == pytest.approx(kl)


def test_parting_and_its_margin() -> None:
    stock = torch.tensor([4, 5, 6])
    exact = torch.zeros(3, 8)
    exact[1, 5], exact[1, 7] = 2.0, 1.75
    assert parity_greedy._parting(torch.tensor([[4, 5, 6], [4, 5, 6]]), stock, exact) == (None, 0.0)
    assert parity_greedy._parting(torch.tensor([[4, 5, 6], [4, 7, 1]]), stock, exact) == (1, 0.25)


def test_red_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "64", "--stride", "24", "--windows", "2", "--device", "cpu", "--dtype", "float32", "--quiet"]
    assert parity.main([*arguments, "--new", "4", *PLAIN, "--inject", "scale"]) == 1
    shown = capsys.readouterr().out
    assert "# Parity: red, fault **scale** planted" in shown and "First wrong layer and token" in shown
