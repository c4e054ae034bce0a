"""The evaluation of families: each has a model that is patched, what alarms or fails is named, one family is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import families, fault_table, models
from hf_fastattn.eval.accuracy import random_families
from hf_fastattn.eval.accuracy.random_families import PREFIX, RANDOM, is_known_here, random_family
from hf_fastattn.patches.registry import FAMILIES
from hf_fastattn.transformers_version import CACHE

SMALL = [
    *("--device", "cpu", "--quiet", "--context", "64", "--stride", "24", "--windows", "2", "--batch", "2"),
    *("--append", "9", "--piece", "5", "--decode", "4"),
]


@pytest.fixture(autouse=True)
def narrow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setattr(random_families, "COMMON", {**random_families.COMMON, **narrow})


@pytest.mark.parametrize("family", [name for name in RANDOM if is_known_here(name)])
def test_every_family_is_patched(family: str) -> None:
    model = random_family(PREFIX + family, 64, torch.float32)
    assert torch.equal(next(model.parameters()), next(random_family(PREFIX + family, 64, torch.float32).parameters()))
    ids = torch.arange(1, 41)[None]
    wanted = model(ids).logits
    with hf_fastattn.patched(model), torch.no_grad():
        cache = hf_fastattn.PagedCache(model.config)
        got = torch.cat([model(part, **{CACHE: cache}, use_cache=True).logits for part in (ids[:, :33], ids[:, 33:])], 1)
        assert hf_fastattn.report(model).last_call.fallbacks == {}
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_all_text_models_that_are_patched_have_one() -> None:
    named = {name.partition("-")[0] for name in RANDOM}
    assert {name.removesuffix("_text") for name in named} <= {name.removesuffix("_text") for name in FAMILIES}
    missing = {name for name in FAMILIES if name.removesuffix("_text") not in {one.removesuffix("_text") for one in named}}
    # Towers stand before these, and the experts of Qwen3.5 are those of Qwen3-Next.
    assert all(any(word in name for word in ("vl", "omni", "3_5_moe")) for name in missing), missing


def test_one_family(tmp_path: Path) -> None:
    given = [*SMALL, "--families", "qwen3", "--evaluations", "perplexity", "--output", str(tmp_path)]
    assert families.main(given) == 0
    record = json.loads((tmp_path / "families.json").read_text())
    assert record["verdict"] == "green" and record["missing"] == []
    (row,) = record["rows"]
    assert row["verdict"] == "green" and row["pages_found"] == [""] and len(row["variants"]) == len(families.VARIANTS)
    assert "| qwen3 | perplexity |" in (tmp_path / "families.md").read_text()


def test_what_alarms_and_what_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = fault_table.evaluate

    def with_a_fault(name: str, arguments: list[str]) -> Any:
        if "random:arcee" in arguments:
            raise RuntimeError("out of luck")
        return evaluate(name, [*arguments, "--inject", "mask"])

    monkeypatch.setattr(fault_table, "evaluate", with_a_fault)
    assert families.main([*SMALL, "--families", "qwen3", "arcee", "--evaluations", "perplexity"]) == 1
    shown = capsys.readouterr().out
    assert "# Families: red: qwen3 (perplexity)" in shown and "- qwen3, perplexity: share=off" in shown
    assert "arcee, perplexity: failed with RuntimeError: out of luck" in shown


def test_what_was_found_is_kept_when_a_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all families say of perplexity comes before what one of them says of parity."""
    asked: list[tuple[str, str]] = []
    variant = {"variant": "share=on", "share": 0.5, "off_path": False}

    def measured(family: str, name: str, *given: Any) -> dict[str, Any]:
        asked.append((name, family))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {
            "family": family, "evaluation": name, "verdict": "green", "variants": [variant], "alarms": [], "pages_found": []
        }  # fmt: skip

    monkeypatch.setattr(families, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        families.main([*SMALL, "--families", "llama", "qwen3", "--output", str(tmp_path)])
    assert asked == [("perplexity", "llama"), ("perplexity", "qwen3"), ("parity", "llama")]
    record, text = json.loads((tmp_path / "families.json").read_text()), (tmp_path / "families.md").read_text()
    assert [row["family"] for row in record["rows"]] == ["llama", "qwen3"] and "# Families: green" in text
    assert "Not run: llama (parity), qwen3 (parity)." in text


def test_nothing_measured_is_not_green() -> None:
    assert families.verdict({"rows": [], "failed": []}) == "red"


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="there is no random model 'gpt2'; the families are llama, "):
        models.load("random:gpt2", torch.float32, "cpu")
