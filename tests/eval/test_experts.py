"""The benchmark of experts: choices as they are named, the check before a figure, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_fastattn.eval import experts
from hf_fastattn.eval.choices import MIXTURES, ROUTINGS
from hf_fastattn.eval.kernel_speed.expert_cases import Inputs, agrees, experts_of, make_inputs, make_weights

CPU = torch.device("cpu")


def inputs(tokens: int, routing: str = "uniform") -> Inputs:
    torch.manual_seed(0)
    sizes = experts_of("small")
    return make_inputs(sizes, tokens, routing, make_weights(sizes, CPU, torch.float32), CPU)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_choices(tokens: int, routing: str) -> None:
    made = inputs(tokens, routing)
    for found in made.routings:
        assert all(len(set(row)) == made.sizes.top_k for row in found.chosen.tolist())
        used = found.chosen.unique()
        if routing == "one":
            assert used.numel() == made.sizes.top_k
        if found.distinct is not None and found.distinct_count is not None:
            assert found.distinct[: int(found.distinct_count)].tolist() == used.tolist()
        if found.counts is not None and found.ranks is not None:
            for expert, count in enumerate(found.counts.tolist()):
                assert sorted(found.ranks[found.chosen == expert].tolist()) == list(range(count))
    assert len({tuple(found.chosen.flatten().tolist()) for found in made.routings}) > 1


def test_a_wrong_result_is_seen() -> None:
    made = inputs(20)
    out = experts.our_launch(made)(0)
    assert isinstance(out, torch.Tensor) and agrees(made, out)
    assert not agrees(made, out + 1e-3)


def test_sizes_are_those_of_the_models() -> None:
    assert [experts_of(name).experts for name in MIXTURES] == [128, 8, 60, 512]
    assert [experts_of(name).inner for name in MIXTURES] == [768, 14336, 1408, 512]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--tokens", "2", "--routing", "one", "uniform", "--output", str(tmp_path)]
    assert experts.main(words) == 0
    rows = json.loads((tmp_path / "experts.json").read_text())["rows"]
    assert [row["routing"] for row in rows] == ["one", "uniform"]
    assert all(row["agrees"] and row["us"]["ours"] > 0 for row in rows)
    text = (tmp_path / "experts.md").read_text()
    assert "| 2 | one | 4.0 |" in text and text.strip() in capsys.readouterr().out


def test_no_figure_on_red(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(experts, "agrees", lambda inputs, out: False)
    assert experts.main(["--rounds", "1", "--tokens", "2", "--routing", "one"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out
