"""Captured decode steps without a GPU: the same forward over the same static tensors, run again instead of replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn.batch import Batch
from hf_fastattn.captured_step import CapturedStep
from hf_fastattn.kernels import reference
from hf_fastattn.kernels.plan import AttentionPlan
from hf_fastattn.static_inputs import StaticInputs
from hf_fastattn.step_graphs import StepGraphs


class ReexecutedStep(CapturedStep):
    """A step whose replay runs the forward. Its output lies in one tensor, as that of a graph."""

    devices = ("cpu", "cuda")
    backends = ("reference", "triton", "hopper")

    @staticmethod
    def make_room(device: torch.device) -> Any:
        return object()

    def capture(self, run: Callable[[], Tensor], warmed_up: Callable[[], None]) -> None:
        run()
        warmed_up()
        self._output = run()

    def replay(self, run: Callable[[], Tensor]) -> Tensor:
        assert self._output is not None
        with torch.inference_mode(False), torch.no_grad():
            self._output.copy_(run())
        return self._output.clone()


class ReadBack(Batch):
    """A static batch for the reference backend, which wants lists: they are read from the static tensors."""

    def slot_mapping(self, window: int | None, device: torch.device) -> Tensor:
        return super().slot_mapping(window, device).long()

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        size, lengths = k_pages.shape[1], self.seq_lens_on(q.device).tolist()
        table = self.page_table(window, q.device).tolist()
        pages = [row[: -(-length // size)] for row, length in zip(table, lengths, strict=True)]
        plan = AttentionPlan(pages, self.query_lens, lengths, size, window)
        return reference.paged_attention(q, k_pages, v_pages, plan, scale=scale, softcap=softcap)[0]


@contextmanager
def reexecuted() -> Iterator[None]:
    """Steps are captured on the CPU too, and for the reference backend."""
    make = StaticInputs.batch

    def batch(self: StaticInputs, backend: str, batch_invariant: bool) -> Batch:
        made = make(self, backend, batch_invariant)
        if backend in ("triton", "hopper"):
            return made
        return ReadBack(**vars(made))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraphs, "step_type", ReexecutedStep)
        patch.setattr(StaticInputs, "batch", batch)
        yield
