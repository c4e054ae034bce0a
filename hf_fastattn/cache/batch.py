"""`Batch`: one forward over a paged cache, as data shared by all layers, and its two operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.kernels.attention import reference, rope_reference
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.backends import choose_backend

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of rows on a device; see `kernels.shared_prefix.paged_decode_shared`.

    Attributes:
        group_starts: `[groups + 1]` int32.
        prefix_lens: `[groups]` int32 tokens.
        max_group_rows: about how many rows the largest group has.
    """

    group_starts: Tensor
    prefix_lens: Tensor
    max_group_rows: int


@dataclass
class Batch:
    """The new tokens of a forward: where they are written and what they read.

    Attributes:
        query_lens: new tokens a row that are stored, host.
        seq_lens: tokens a row after the append, host.
        plans: reads by window.
        slots: `page * P + offset` of every new token, packed row after row, by window, host.
        backend: `FastAttnConfig.backend`.
        workspaces: by device and stream; lives with the model's pages.
        workspace: the one to use instead, whatever the stream.
        batch_invariant: `FastAttnConfig.batch_invariant`.
        shared: prefixes that layers without a window read once for all their rows, in decode.
    """

    query_lens: list[int]
    seq_lens: list[int]
    plans: Mapping[int | None, ReadPlan]
    slots: Mapping[int | None, list[int]]
    backend: str = "auto"
    workspaces: dict[tuple[torch.device, int], Workspace] = field(default_factory=dict)
    batch_invariant: bool = False
    workspace: Workspace | None = None
    shared: SharedPrefixes | None = None
    _tensors: dict[tuple[str, int | None, torch.device], Tensor] = field(default_factory=dict)
    _rope: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """New tokens of all rows (T)."""
        return sum(self.query_lens)

    @property
    def max_query_len(self) -> int:
        """The most new tokens of a row."""
        return max(self.query_lens)

    @property
    def is_decode(self) -> bool:
        """Every row has one new token."""
        return all(length == 1 for length in self.query_lens)

    # ---- the batch on a device, made once for all its layers --------------------------------------------------

    def slot_mapping(self, window: int | None, device: torch.device) -> Tensor:
        """`[T]` int64 slots of the new tokens."""
        return self._on("slots", window, device, torch.int64)

    def page_table(self, window: int | None, device: torch.device) -> Tensor:
        """`[B, columns]` int32 pages of the rows, -1 past their end."""
        return self._on("pages", window, device)

    def seq_lens_on(self, device: torch.device) -> Tensor:
        """`[B]` int32 keys a row after the append."""
        return self._on("seq_lens", None, device)

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """`[B + 1]` int32, where each row's queries begin."""
        return self._on("cu_seqlens", None, device)

    def _on(self, name: str, window: int | None, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
        key = (name, window, device)
        if key not in self._tensors:
            host = torch.tensor(self._host(name, window), dtype=dtype, device="cpu")
            # From pageable memory this returns once the data is staged, without waiting for the device.
            self._tensors[key] = host.to(device, non_blocking=True)
        return self._tensors[key]

    def _host(self, name: str, window: int | None) -> Sequence[Any]:
        if name == "slots":
            return self.slots[window]
        if name == "pages":
            rows = self.plans[window].pages
            columns = max(map(len, rows))
            return [row + [-1] * (columns - len(row)) for row in rows]
        return self.seq_lens if name == "seq_lens" else [0, *accumulate(self.query_lens)]

    def rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin as `[T, rotary dims]`, from the model's `[1 or B, S, rotary dims]`."""
        held = self._rope.get(cos.device)
        if held is None or held[0] is not cos:
            flat = []
            for table in (cos, rope_reference.signed_sin(sin)):
                rows = self.tokens // table.shape[1]
                flat.append(table.expand(rows, -1, -1).reshape(self.tokens, -1))
            held = (cos, flat[0], flat[1])
            self._rope[cos.device] = held
        return held[1], held[2]

    def forget_rope(self) -> None:
        """Let go of the tables made by `rope()`."""
        self._rope.clear()

    # ---- the operations ---------------------------------------------------------------------------------------

    def rope_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        window: int | None,
        **norms: Any,
    ) -> Tensor:
        """[qk-norm] + RoPE + append of the new tokens `[T, heads, D]`; see `kernels.rope.rope_append`.

        Args:
            cos: from `rope()`; `sin` likewise.
            window: of the layer, which says where its pages are.
            norms: `q_norm`, `k_norm`, `eps`, `unit_offset`.

        Returns:
            `[T, H, D]` rotated queries.
        """
        slots = self.slot_mapping(window, k.device)
        if self._backend_of(q) != "reference":
            from hf_fastattn.kernels.attention import append

            return append.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, **norms)
        return rope_reference.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, **norms)

    def attend(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        window: int | None,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of the new queries `[T, H, D]` over the pages of their rows.

        Returns:
            `[T, H, D]` in q's dtype.
        """
        if self._backend_of(q) != "reference":
            if self.shared is not None and window is None:
                return self._attend_shared(q, k_pages, v_pages, self.shared, scale, softcap)
            return self._attend_triton(q, k_pages, v_pages, window, scale, softcap)
        out, _ = reference.paged_attention(q, k_pages, v_pages, self.plans[window], scale=scale, softcap=softcap)
        return out

    def _attend_triton(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, scale: float, softcap: float | None
    ) -> Tensor:
        from hf_fastattn.kernels.attention.paged import paged_attention

        device = q.device
        out, _ = paged_attention(
            q, k_pages, v_pages, self.page_table(window, device), None if self.is_decode else self.cu_seqlens_on(device),
            self.seq_lens_on(device), max_query_len=self.max_query_len, scale=scale, window=window, softcap=softcap,
            workspace=self._workspace(device), hopper=self._backend_of(q) == "hopper",
            batch_invariant=self.batch_invariant,
        )  # fmt: skip
        return out

    def _attend_shared(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, shared: SharedPrefixes, scale: float, softcap: float | None
    ) -> Tensor:
        from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared

        device = q.device
        out, _ = paged_decode_shared(
            q, k_pages, v_pages, self.page_table(None, device), self.seq_lens_on(device), shared.group_starts,
            shared.prefix_lens, max_group_rows=shared.max_group_rows, scale=scale, softcap=softcap,
            workspace=self._workspace(device),
        )  # fmt: skip
        return out

    def _backend_of(self, q: Tensor) -> str:
        return choose_backend(self.backend, q.device, q.dtype, q.shape[-1], self.batch_invariant)[0]

    def _workspace(self, device: torch.device) -> Workspace:
        from hf_fastattn.kernels.attention.workspace import Workspace

        if self.workspace is not None:
            return self.workspace
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream)
        if key not in self.workspaces:
            self.workspaces[key] = Workspace(device)
        return self.workspaces[key]
