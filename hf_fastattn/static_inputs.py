"""`StaticInputs`: what one decode step reads, in device tensors that stay where they are from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.batch import Batch
from hf_fastattn.cache import PagedCache
from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.staging import Staging

# Views begin at multiples of this many int32: kernels are compiled for the alignment of their pointers.
ALIGNMENT = 64
MIN_COLUMNS = 64
# Arguments that static inputs stand for, and those that change nothing that a step computes.
STATIC = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "is_causal",
)  # fmt: skip


@dataclass(frozen=True)
class StepShape:
    """What two decode steps must have in common to share static inputs.

    Attributes:
        rows: of the batch (B).
        tokens: `input_ids` or `inputs_embeds`, with its `dtype` and what follows `[B, 1]` in its shape.
        axes: `()` for position ids `[B, 1]`, `(n,)` for `[n, B, 1]`.
        device: of all tensors.
    """

    rows: int
    tokens: str
    dtype: torch.dtype
    features: tuple[int, ...]
    axes: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(arguments: dict[str, Any]) -> StepShape:
        """That of the arguments of a decoder's forward."""
        name = "input_ids" if arguments["input_ids"] is not None else "inputs_embeds"
        tokens, positions = arguments[name], arguments["position_ids"]
        axes = () if positions is None else tuple(positions.shape[:-2])
        return StepShape(tokens.shape[0], name, tokens.dtype, tuple(tokens.shape[2:]), axes, tokens.device)


class StaticInputs:
    """Tokens, positions, and in one packed int32 tensor slots, lengths and page tables.

    Args:
        shape: of the step.
        columns: pages a row that there is room for.
        windows: of the cache's page tables.
    """

    def __init__(self, shape: StepShape, columns: int, windows: Iterable[int | None]) -> None:
        self.shape = shape
        self.columns = columns
        self.windows = tuple(windows)
        rows, device = shape.rows, shape.device
        self._stride = _aligned(rows)
        # Slots by window, then lengths: they change every step. Tables, behind them, change now and then.
        self._head = self._stride * (len(self.windows) + 1)
        self._table = _aligned(rows * columns)
        size = self._head + self._table * len(self.windows)
        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self.tokens = torch.zeros(rows, 1, *shape.features, dtype=shape.dtype, device=device)
            self.position_ids = torch.zeros(*shape.axes, rows, 1, dtype=torch.int64, device=device)
            # Transformers passes a 4-D mask on as it is; our attention ignores it.
            self.mask = torch.zeros(1, 1, 1, 1, device=device)
            self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._staging = Staging(size, device)
        self._uploaded: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """The arguments of the decoder's forward."""
        return {
            "input_ids": None,
            "inputs_embeds": None,
            self.shape.tokens: self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": self.mask,
        }

    def batch(self, backend: str, batch_invariant: bool) -> Batch:
        """A batch of one new token a row whose tensors are these, with a workspace of its own."""
        from hf_fastattn.kernels.workspace import Workspace

        rows, device = self.shape.rows, self.shape.device
        tensors: dict[tuple[str, int | None, torch.device], Tensor] = {}
        for place, window in enumerate(self.windows):
            tensors["slots", window, device] = self._packed[self._slots(place)]
            tensors["pages", window, device] = self._packed[self._pages(place)].view(rows, self.columns)
        tensors["seq_lens", None, device] = self._packed[self._slots(len(self.windows))]
        return Batch(
            [1] * rows, [], {}, {}, backend,
            batch_invariant=batch_invariant, workspace=Workspace(device), _tensors=tensors,
        )  # fmt: skip

    def _slots(self, place: int) -> slice:
        return slice(place * self._stride, place * self._stride + self.shape.rows)

    def _pages(self, place: int) -> slice:
        start = self._head + place * self._table
        return slice(start, start + self.shape.rows * self.columns)

    def write(self, arguments: dict[str, Any], cache: PagedCache, seq_lens: list[int]) -> None:
        """Put the values of a step in place, without a look at the device.

        Args:
            arguments: of the decoder's forward.
            cache: its tables.
            seq_lens: tokens a row after the append.
        """
        self.tokens.copy_(arguments[self.shape.tokens])
        if arguments["position_ids"] is None:
            self.position_ids.fill_(cache.get_seq_length())
        else:
            self.position_ids.copy_(arguments["position_ids"])
        host = self._staging.next()
        lengths = np.array(seq_lens, np.int32)
        host[self._slots(len(self.windows))] = lengths
        tables: list[NDArray[np.int32]] = []
        versions: list[int] = []
        for place, window in enumerate(self.windows):
            table = cache.tables[window]
            host[self._slots(place)] = table.newest_slots(lengths)
            pages, version = table.as_array()
            tables.append(pages)
            versions.append(version)
        count = self._head
        if self._uploaded != tuple(versions):
            for place, pages in enumerate(tables):
                used = min(pages.shape[1], self.columns)
                host[self._pages(place)].reshape(self.shape.rows, self.columns)[:, :used] = pages[:, :used]
            count = self._packed.shape[0]
        self._staging.send(self._packed, count)
        self._uploaded = tuple(versions)


def why_not_static(decoder: Any, arguments: dict[str, Any], kwargs: dict[str, Any]) -> str | None:
    """Why a forward of one new token a row asks for more than static inputs can say; None if it doesn't."""
    for name, value in (*arguments.items(), *kwargs.items()):
        if name not in STATIC and value is not None and value is not False:
            return f"{name} is given"
    if kwargs.get("use_cache") is False or kwargs.get("is_causal") is False:
        return "use_cache=False or is_causal=False"
    if decoder.config.output_hidden_states and kwargs.get("output_hidden_states") is not False:
        return "output_hidden_states is set"
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    positions = arguments["position_ids"]
    if positions is not None and (positions.device != tokens.device or positions.shape[-1] != 1):
        return f"position_ids of shape {tuple(positions.shape)} on {positions.device}"
    if torch.is_grad_enabled() and tokens.requires_grad:
        return "gradients are needed"
    if torch.is_autocast_enabled(tokens.device.type):
        return "autocast is on"
    return None


def columns_for(cache: PagedCache, seq_lens: list[int]) -> tuple[int, int]:
    """Pages a row that a step needs, and those worth making room for."""
    size = cache.groups.page_size
    needed = -(-max(seq_lens) // size)
    return needed, max(power_of_2(max(needed, -(-cache.room // size))), MIN_COLUMNS)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
