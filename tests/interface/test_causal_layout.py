"""What a `CausalLayout` makes for the kernels: the pages of every row from its first token on, and room for their states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hf_fastattn.dense import causal_layout
from hf_fastattn.dense.causal_layout import CausalLayout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    causal_layout._kept_workspace.cache_clear()
    yield
    causal_layout._kept_workspace.cache_clear()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("row_step", [0, 40, 64])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("hidden", [0, 5])
def test_page_table(rows: int, row_step: int, page: int, hidden: int) -> None:
    mask = torch.ones(rows, 37, dtype=torch.bool)
    mask[0, :hidden] = False
    layout = CausalLayout.of_mask(mask, 40)
    assert layout is not None and layout.padded == (hidden > 0)
    starts = [hidden, 0, 0][:rows]
    # Pages overlap: each begins so many tokens after the last, wherever the row begins.
    want = [[row * row_step + start + token for token in range(0, 37, page)] for row, start in enumerate(starts)]
    found, lengths = layout.page_table(row_step, page), layout.seq_lens
    assert found.tolist() == want and lengths.tolist() == [37 - start for start in starts]
    assert found.dtype == lengths.dtype == torch.int32


def test_the_workspace_is_kept_from_forward_to_forward() -> None:
    pytest.importorskip("triton")
    first, second = (CausalLayout.unpadded(2, length, CPU) for length in (8, 9))
    assert first.workspace(CPU, 7) is second.workspace(CPU, 7) is not first.workspace(CPU, 8)


def test_what_is_captured_has_a_workspace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory made in a capture belongs to its graph."""
    workspace = pytest.importorskip("hf_fastattn.kernels.attention.workspace")
    made: list[torch.device] = []
    monkeypatch.setattr(workspace, "Workspace", lambda device: made.append(device) or object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing, device = True, torch.device("cuda:0")
    first, second = (CausalLayout.unpadded(2, length, CPU) for length in (8, 9))
    assert first.workspace(device, 7) is first.workspace(device, 7) is not second.workspace(device, 7)
    capturing = False
    assert first.workspace(device, 7) is second.workspace(device, 7) and len(made) == 3
