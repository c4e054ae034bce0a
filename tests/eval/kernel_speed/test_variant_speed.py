"""The benchmark of variants, on a CPU at small sizes."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.eval import attention
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.choices import VARIANTS
from hf_fastattn.eval.kernel_speed import variant_cases, variant_speed
from hf_fastattn.eval.kernel_speed.attention_cases import Shape
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.variant import Variant

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e9, 1e9)


def measured(make: variant_cases.Made, new: int = 1) -> dict:
    case = variant_cases.Case("one", Shape("decode" if new == 1 else "prefill", "1 x 128", (128,), (new,)), make)
    return variant_speed.measure_variant(case, 16, CPU, torch.float32, 1, CEILINGS)


@pytest.mark.parametrize("new", [1, 128])
def test_a_line(new):
    row = measured(lambda device: built_in.softcap(3.0), new)
    assert row["agrees"] and row["visited"] == 1.0
    assert "softcap" not in variant_speed.variant_table([row]) and "| one |" in variant_speed.variant_table([row])


def test_a_wrong_result_has_no_figures(monkeypatch):
    wrong = variant_speed.reference_launches
    monkeypatch.setattr(variant_speed, "reference_launches", lambda inputs, variant: wrong(inputs, built_in.softcap(1.0)))
    row = measured(lambda device: Variant())
    assert not row["agrees"] and "us" not in row
    assert "WRONG RESULT" in variant_speed.variant_table([row])


def test_lines_of_some_variants():
    lines = variant_cases.cases(False, ["plain", "documents"])
    assert {line.name for line in lines} == {"plain", "documents"}
    assert {line.shape.name for line in lines} == {"1 x 8k", "64 x 8k", "4 x 4k", "64 x 1k", "1 x 32k"}
    assert {line.name for line in variant_cases.cases(False)} == set(VARIANTS)
    assert {line.name for line in variant_cases.cases(True)} == set(variant_cases.SMALL)


def test_names_of_lines_on_the_command_line(capsys):
    assert parser("bench attention").parse(["--variants"]).variants == []
    assert parser("bench attention").parse([]).variants is None
    assert parser("bench attention").parse(["--variants", "sinks and window", "alibi"]).variants == [
        "sinks and window",
        "alibi",
    ]
    with pytest.raises(SystemExit):
        parser("bench attention").parse(["--variants", "windows"])
    assert "windows" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["softcap"]])
def test_all_variants_or_some_are_measured(names, monkeypatch):
    monkeypatch.setattr(variant_speed, "measure_variant", lambda case, *rest: {"agrees": False, **vars(case)})
    monkeypatch.setattr(variant_speed, "measure_ceilings", lambda *device: CEILINGS)
    written = []
    monkeypatch.setattr(variant_speed, "write", lambda folder, name, text, record, draw: written.append(record["rows"]))
    monkeypatch.setattr(variant_speed, "variant_table", lambda rows: "")
    assert attention.main(["--variants", *names]) == 1
    assert {row["name"] for row in written[0]} == set(names or variant_cases.SMALL)


def test_what_a_variant_visits():
    """Of 4 rows and 2 columns of tiles under the diagonal, 6 are visited; a chunk of 64 leaves 4."""
    shape = Shape("prefill", "1 x 128", (128,), (128,))
    tiles, pairs = variant_cases.visited(built_in.chunked(64), shape, CPU)
    assert tiles == pytest.approx(4 / 6)
    assert pairs == pytest.approx(64 * 65 / (128 * 129 / 2))
