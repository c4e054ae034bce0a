"""`Batch`: one forward over a paged cache, as data shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_fastattn.kernels.plan import AttentionPlan
from hf_fastattn.kernels.rope import signed_sin


@dataclass
class Batch:
    """The new tokens of a forward: where they are written and what they read.

    Attributes:
        query_lens: new tokens a row that are stored, host.
        seq_lens: tokens a row after the append, host.
        plans: reads by window.
        slots: `page * P + offset` of every new token, packed row after row, by window, host.
    """

    query_lens: list[int]
    seq_lens: list[int]
    plans: dict[int | None, AttentionPlan]
    slots: dict[int | None, list[int]]
    _slot_tensors: dict[tuple[int | None, torch.device], Tensor] = field(default_factory=dict)
    _rope: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """New tokens of all rows (T)."""
        return sum(self.query_lens)

    def slot_mapping(self, window: int | None, device: torch.device) -> Tensor:
        """`[T]` int64 slots of the new tokens."""
        key = (window, device)
        if key not in self._slot_tensors:
            self._slot_tensors[key] = torch.tensor(self.slots[window], dtype=torch.int64, device=device)
        return self._slot_tensors[key]

    def rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin as `[T, rotary dims]`, from the model's `[1 or B, S, rotary dims]`."""
        held = self._rope.get(cos.device)
        if held is None or held[0] is not cos:
            flat = []
            for table in (cos, signed_sin(sin)):
                rows = self.tokens // table.shape[1]
                flat.append(table.expand(rows, -1, -1).reshape(self.tokens, -1))
            held = (cos, flat[0], flat[1])
            self._rope[cos.device] = held
        return held[1], held[2]
