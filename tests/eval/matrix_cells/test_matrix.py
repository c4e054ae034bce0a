"""The matrix benchmark: every call, state and family runs on tiny models; what is slower, larger, wrong or fails is red."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fastattn import cli, patching
from hf_fastattn.eval import matrix
from hf_fastattn.eval.matrix_cells import calls, families, measure, side, states
from hf_fastattn.eval.matrix_cells.calls import CALLS
from hf_fastattn.eval.matrix_cells.cells import ALLOWED, CELLS, QUICK, TRAINER, Cell, allowed, choose
from hf_fastattn.eval.matrix_cells.families import BY_INTERFACE, FAMILIES, FIXED, Size
from hf_fastattn.eval.matrix_cells.peaks import idle_in_pools, watched
from tests.tools.models import COMMON, EXPERTS

DRAWING = ("sampled", "min-p", "typical", "samples", "repeated")
SIZE = families.SIZES["cpu"]
TINY = Size(
    {
        **{name: value for name, value in COMMON.items() if name not in FIXED and name != "initializer_range"},
        "head_dim": 16,
        "num_hidden_layers": 4,
    },
    {**EXPERTS, "shared_expert_intermediate_size": 32},
    window=24,
    prompt=32,
    rows=2,
)


@pytest.fixture(autouse=True)
def tiny_and_patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models, and no time that is too long."""
    monkeypatch.setitem(families.SIZES, "cpu", TINY)
    monkeypatch.setitem(measure.SLOWER, "cpu", float("inf"))
    monkeypatch.setattr(measure, "allowed", lambda *_: None)
    yield


def run(*arguments: str, output: Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON record and Markdown of a run."""
    status = cli.main(
        ["bench", "matrix", "--device", "cpu", "--pairs", "1", "--new", "2", *arguments, "--output", str(output)]
    )
    return status, json.loads((output / "matrix-cpu.json").read_text()), (output / "matrix-cpu.md").read_text()


def test_the_table_of_cells() -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names) and set(QUICK) <= set(names)
    assert {cell.family for cell in CELLS} == set(FAMILIES) and {cell.call for cell in CELLS} == set(CALLS)
    words = {word for cell in CELLS for word in cell.state.split("+")}
    assert words == {*states.DTYPES, *states.STATES}
    assert calls.GREEDY == tuple(name for name in CALLS if name not in DRAWING)
    assert all(limit > 1 and reason for entries in ALLOWED.values() for limit, reason in entries.values())
    timed = [f"{name}: {words}" for name in names for words in measure.TIMED.values()]
    assert all(any(fnmatch(name, pattern) for name in timed) for entries in ALLOWED.values() for pattern in entries)
    assert set(BY_INTERFACE) < set(FAMILIES) and ALLOWED.keys() == measure.SLOWER.keys()


def test_the_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.SIZES, "cpu", SIZE)
    start = time.process_time()
    assert cli.main(["bench", "matrix", "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    assert time.process_time() - start < 20
    record = json.loads((tmp_path / "matrix-cpu.json").read_text())
    assert {row["name"] for row in record["cells"]} == set(QUICK) and all(row["path"] for row in record["cells"])


def test_chosen_cells() -> None:
    assert choose(None, quick=False) == list(CELLS) and [cell.name for cell in choose(None, quick=True)] == [
        cell.name for cell in CELLS if cell.name in QUICK
    ]
    assert {cell.family for cell in choose(["*/bf16/greedy"], quick=False)} == set(FAMILIES)
    with pytest.raises(ValueError, match="'nothing' matches no cell"):
        choose(["llama/*", "nothing"], quick=False)


def test_every_call(tmp_path: Path) -> None:
    status, record, text = run("--cell", "llama/bf16/*", output=tmp_path)
    assert status == 0 and {row["call"] for row in record["cells"]} == set(CALLS)
    for row in record["cells"]:
        assert row["agrees"] and not row["red"] and row["ours"]["peak"] is None, row
        assert ("fell back" in row["path"]) == (row["call"] == "no cache") and len(row["ours"]["timings"]) == 1
        assert f"| {row['name']} |" in text
    assert f"0 of {len(CALLS)} cells are red" in text and not record["failed"]


def test_every_state_and_family(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    chosen = {cell.state: cell.name for cell in CELLS if cell.family == "llama"} | {
        cell.family: cell.name for cell in CELLS if cell.family != "llama"
    }
    status, record, _ = run("--cell", *chosen.values(), output=tmp_path)
    assert status == 0 and not record["skipped"]
    paths = {row["name"]: row["path"] for row in record["cells"]}
    assert {cell.state for cell in CELLS} == {row["state"] for row in record["cells"]}
    assert all(path.startswith("kernels {") == (name.split("/")[0] in BY_INTERFACE) for name, path in paths.items())
    assert all("paged forwards" in path or name.split("/")[0] in BY_INTERFACE for name, path in paths.items())


@pytest.mark.parametrize("error", [RuntimeError("planted"), ImportError("no such package")])
def test_a_cell_that_fails_is_named_and_others_go_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = side.build

    def failing(family: str, *given: Any) -> Any:
        if family == "llama":
            raise error
        return build(family, *given)

    monkeypatch.setattr(side, "build", failing)
    status, record, text = run("--cell", "llama/fp32/greedy", "gemma2/fp32/greedy", output=tmp_path)
    is_missing = isinstance(error, ImportError)
    assert status == (0 if is_missing else 1) and [row["family"] for row in record["cells"]] == ["gemma2"]
    assert [found["cell"] for found in record["skipped" if is_missing else "failed"]] == ["llama/fp32/greedy"]
    assert ("skipped" if is_missing else "failed") in text and str(error) in text


@pytest.mark.parametrize(("cell", "amount"), [("llama/fp32/greedy", 1e-3), ("llama/bf16/greedy", 0.3)])
def test_another_result_is_red(cell: str, amount: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(model: Any, state: str) -> Any:
        made.append(model)
        if len(made) == 2:
            model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach() * (1 + amount))
        return put(model, state)

    made: list[Any] = []
    put = side.put
    monkeypatch.setattr(side, "put", disturbed)
    status, record, text = run("--cell", cell, output=tmp_path)
    assert status == 1 and record["cells"][0]["red"] == ["computes something else"] and "**RED**" in text


def row_of(first: float = 1.0, token: float = 1.0, best: float | None = None, more: float = 0.0) -> dict[str, Any]:
    ratios = {"first": first, "token": token}
    peaks = [{"peak": {"total": total}} for total in (1e9, 1e9 + more)]
    best_ratios = ratios if best is None else {"first": best, "token": best}
    return {"agrees": True, "ratios": ratios, "best_ratios": best_ratios, "stock": peaks[0], "ours": peaks[1]}


LIMITS = {"first": 1.03, "token": 1.03}


def test_what_is_red() -> None:
    assert measure.red(row_of(1.02, 1.02), LIMITS) == []
    assert measure.red(row_of(1.2), LIMITS) == ["first token 1.20 x stock's time"]
    assert measure.red(row_of(token=1.2), LIMITS) == ["a token 1.20 x stock's time"]
    assert measure.red(row_of(1.2, 1.2), {**LIMITS, "first": 1.25}) == ["a token 1.20 x stock's time"]
    # The best calls say that others were in the way.
    assert measure.red(row_of(1.2, 1.2, best=1.0), LIMITS) == []
    assert measure.red(row_of(more=2e8), LIMITS) == ["200 MB more than stock"]
    assert measure.red(row_of(more=1e8), LIMITS) == [] and measure.red({**row_of(more=2e8), "agrees": False}, LIMITS) != []


@pytest.mark.parametrize("words", measure.TIMED.values())
def test_a_named_cell_may_be_slower(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {words: name for name, words in measure.TIMED.items()}
    # The difference of two calls of a millisecond may come out as anything.
    monkeypatch.setattr(measure, "ratios", lambda *given: (2.0, 2.0) if given[2] == names[words] else (0.5, 0.5))
    monkeypatch.setitem(measure.SLOWER, "cpu", 1.1)
    monkeypatch.setattr(measure, "allowed", allowed)
    for limit, status in ((2.1, 0), (1.9, 1)):
        monkeypatch.setitem(ALLOWED, "cpu", {f"llama/fp32/*: {words}": (limit, "a good reason")})
        found, record, text = run("--cell", "llama/fp32/greedy", output=tmp_path)
        assert found == status and record["cells"][0]["red"] == [f"{words} 2.00 x stock's time"] * status
        assert len(record["cells"][0]["ours"]["timings"]) == (measure.DOUBTFUL if status else 1)
        assert ("llama/fp32/greedy is allowed to be slower: a good reason." in text) == (not status)


def test_a_limit_is_for_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ratios", lambda *given: (2.0, 2.0))
    monkeypatch.setitem(measure.SLOWER, "cpu", 1.1)
    monkeypatch.setattr(measure, "allowed", allowed)
    monkeypatch.setitem(ALLOWED, "cpu", {"llama/fp32/*: first token": (2.1, "a good reason")})
    status, record, text = run("--cell", "llama/fp32/greedy", output=tmp_path)
    assert status == 1 and record["cells"][0]["red"] == ["a token 2.00 x stock's time"] and "good reason" not in text


@pytest.mark.parametrize(("state", "wide"), [("bf16", torch.float32), ("fp32", torch.float64)])
def test_wider_for_a_while(state: str, wide: torch.dtype) -> None:
    pytest.importorskip("accelerate")
    model = states.put(families.build("llama", torch.device("cpu"), states.dtype_of(state)), f"{state}+accelerate")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    wrapped = model.forward
    with states.lifted(model, state):
        assert {parameter.dtype for parameter in model.parameters()} == {wide} and model.forward is not wrapped
    assert {
        name: parameter.data_ptr() for name, parameter in model.named_parameters()
    } == before and model.forward is wrapped


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown words"):
        states.put(None, "bf16+nothing")


def test_idle_memory_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [(0, 0), (0, 1), (0, 1)]
    segments = [
        {"device": device, "segment_pool_id": pool, "total_size": 100, "allocated_size": 30}
        for device in (0, 1)
        for pool in pools
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert idle_in_pools(torch.device("cuda:0")) == 2 * 70


@pytest.mark.gpu
def test_memory_of_a_graph_counts() -> None:
    device, megabyte = torch.device("cuda:0"), 2**20
    with watched(device) as peak:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(64 * megabyte, dtype=torch.uint8, device=device).sum()
    assert peak is not None and peak.graphs >= 64 * megabyte and peak.reserved >= 64 * megabyte
    del graph


def test_the_patch_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = side.sides(Cell("llama", TRAINER.split("+")[0], "greedy"), torch.device("cpu"), {})
    assert patching.find_model(ours.model) is ours.model and not hasattr(stock.model, "_fastattn")
    assert all(a is b for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True))
    assert matrix.STANDARD.keys() == measure.SLOWER.keys() == families.SIZES.keys()
