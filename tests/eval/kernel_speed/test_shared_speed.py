"""The benchmark of shared prefixes, on a CPU at small sizes."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.eval.kernel_speed import shared_cases, shared_speed
from hf_fastattn.eval.kernel_speed.attention_cases import HEADS
from hf_fastattn.eval.kernel_speed.ceilings import Ceilings
from hf_fastattn.eval.kernel_speed.shared_cases import SharedShape, make_shared_inputs

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e9, 1e9)
SHAPES = [SharedShape(1, 3, 64, 5), SharedShape(2, 2, 32, 20, HEADS), SharedShape(1, 2, 32, 5, rope=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_line(shape):
    row = shared_speed.measure_shared(shape, 16, CPU, torch.float32, 1, CEILINGS)
    assert row["agrees"] and row["us"]["ours"] > 0
    assert f"| {shape.name} |" in shared_speed.shared_table([row])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_prompt_is_stored_once(shape):
    inputs = make_shared_inputs(shape, 16, CPU, torch.float32)
    stored, columns = inputs.k_pages[0].shape[0], shape.prefix // 16
    assert stored == shape.prompts * columns + shape.rows * -(-shape.suffix // 16)
    assert inputs.page_table.unique().numel() == stored
    for first, past in zip(inputs.group_starts.tolist(), inputs.group_starts.tolist()[1:], strict=False):
        assert (inputs.page_table[first:past, :columns] == inputs.page_table[first, :columns]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_wrong_result_has_no_figures(shape, monkeypatch):
    right = shared_speed.reference_launches

    def one_wrong(inputs):
        found = right(inputs)
        name, launch = list(found.items())[-1]
        return {**found, name: lambda i: launch(i) * 1.01}

    monkeypatch.setattr(shared_speed, "reference_launches", one_wrong)
    row = shared_speed.measure_shared(shape, 16, CPU, torch.float32, 1, CEILINGS)
    assert not row["agrees"] and "us" not in row
    assert "WRONG RESULT" in shared_speed.shared_table([row])


def test_a_prefix_ends_with_a_page():
    with pytest.raises(ValueError, match="prefix=24"):
        make_shared_inputs(SharedShape(1, 2, 24), 16, CPU, torch.float32)


def test_the_headline_is_there():
    """256 rows of 32k tokens: without grouped heads, with groups, and with RoPE in the kernel; all are named apart."""
    found = [shape for shape in shared_cases.shared_shapes(small=False) if (shape.rows, shape.prefix) == (256, 32768)]
    assert {(shape.kv_heads, shape.rope) for shape in found} == {(HEADS, False), (8, False), (8, True)}
    names = [shape.name for shape in shared_cases.shared_shapes(small=False)]
    assert len(set(names)) == len(names)


def test_the_table_has_the_peers_and_the_figures_of_flashinfer():
    gbs = {"ours": 10.0, "not shared": 5.0, "page by page": 1.0}
    row = {"shape": "s", "agrees": True, "us": {"ours": 2.0, "not shared": 4.0, "page by page": 20.0}, "gbs": gbs}
    row |= {"ratios": {"not shared": 2.0, "page by page": 10.0}, "limit_us": 1.0, "share_of_limit": 0.5, "tflops": 3.0}
    alone = {
        "shape": "peer",
        "agrees": True,
        "us": {"page by page": 20.0},
        "gbs": {"page by page": 1.0},
        "share_of_read": 0.8,
    }
    lines = shared_speed.shared_table([{**row, "flashinfer_us": [8.0, 9.0, 3.0]}, alone]).splitlines()
    assert lines[-2].endswith("| 2.00 | 20.0 | 1 | 10.00 | 8 | 9 | 3 | 1.50 |")
    assert "0.80 of the read ceiling" in lines[-1]
    assert len({line.count("|") for line in lines[2:]}) == 1
