"""`CausalLayout`: which keys of a dense `[B, G, L, D]` cache the queries of one forward see, as data for the kernels.

A dense tensor is page storage as it stands. Kernels add `page * stride_page` and `slot * stride_slot`; with both strides
those of a token, a page may begin at any token, so pages of a fixed size follow a row from its first real key on,
whatever L and the padding are. (The page size is compiled into the kernels: pages of L tokens would compile once a step.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.kernels.attention.read_plan import ReadPlan

if TYPE_CHECKING:
    from hf_fastattn.dense.stock_attention import OneLaunch
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.kernels.relaunch import Launch

# Tokens a page in the tables for Triton; shorter rows take pages of one token.
PAGE_SIZE = 16
# A mask carries its layout under this name to every layer.
ATTRIBUTE = "_fastattn_layout"


@dataclass
class CausalLayout:
    """Queries that are the last of `filled` tokens; each sees the real keys up to its own, `window` of them at most.

    Attributes:
        rows: sequences (B).
        device: of the tensors.
        padded: whether a row has padding, host.
        filled: keys that hold tokens; what lies behind them in a static cache is never read.
        kv_length: keys that the tensor has room for (L).
        window: keys a query sees, itself included; None for all.
        launches: those of the first layer of a kind, with their LSE, which further layers repeat; by what must agree.
        one_launch: PyTorch's attention without a mask, if that did all in one launch for a layer before.
        backends: those chosen for calls of earlier layers, by all that the choice depends on.
    """

    rows: int
    device: torch.device
    padded: bool
    filled: int
    kv_length: int
    window: int | None = None
    _tensors: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _plans: dict[tuple[int, int], ReadPlan] = field(default_factory=dict)
    _workspaces: dict[int, Workspace] = field(default_factory=dict)
    launches: dict[tuple[Any, ...], tuple[Launch, Tensor]] = field(default_factory=dict)
    one_launch: OneLaunch | None = None
    backends: dict[tuple[Any, ...], str] = field(default_factory=dict)

    @classmethod
    def unpadded(
        cls, rows: int, filled: int, device: torch.device, kv_length: int | None = None, window: int | None = None
    ) -> CausalLayout:
        """The layout of `rows` rows of `filled` tokens."""
        return cls(rows, device, False, filled, kv_length or filled, window)

    @classmethod
    def of_mask(cls, mask: Tensor, kv_length: int, window: int | None = None) -> CausalLayout | None:
        """The layout behind a padding mask `[B, filled]`, true for tokens; None unless all padding is on the left.

        Costs one host sync on an accelerator if there is no padding, as Transformers' own mask does, else two.
        """
        real, filled = mask.bool(), mask.shape[1]
        if bool(real.all()):
            return cls.unpadded(mask.shape[0], filled, mask.device, kv_length, window)
        starts = filled - real.sum(1, dtype=torch.int32)
        places = torch.arange(filled, device=mask.device)
        on_the_left = (real == (places >= starts[:, None])).all()
        left, padded = torch.stack((on_the_left, (starts > 0).any())).tolist()
        return cls.of_starts(starts, padded, filled, kv_length, window) if left else None

    @classmethod
    def of_starts(cls, starts: Tensor, padded: bool, filled: int, kv_length: int, window: int | None = None) -> CausalLayout:
        """The layout of rows whose first real keys are `starts`, `[B]` int32."""
        return cls(len(starts), starts.device, padded, filled, kv_length, window, {("starts", 0, 0): starts})

    # ---- for the Triton kernels -------------------------------------------------------------------------------

    @property
    def starts(self) -> Tensor:
        """`[B]` int32, the first key of each row that is no padding."""
        return self._made("starts", 0, 0)

    @property
    def seq_lens(self) -> Tensor:
        """`[B]` int32 real keys a row; fewer than the queries where these are padding too, which then see none."""
        return self._made("seq_lens", 0, 0)

    def cu_seqlens(self, queries: int) -> Tensor:
        """`[B + 1]` int32, where the queries of each row begin."""
        return self._made("cu_seqlens", queries, 0)

    def page_table(self, row_step: int, page_size: int) -> Tensor:
        """`[B, columns]` int32 pages of `page_size` tokens from each row's first real key on.

        Args:
            row_step: tokens from a row to the next in memory.
        """
        return self._made("page_table", row_step, page_size)

    def workspace(self, device: torch.device, stream: int) -> Workspace:
        """Room for partial states, one for each stream; kept from one forward to the next, but for what is captured."""
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return _kept_workspace(device, stream)
        from hf_fastattn.kernels.attention.workspace import Workspace

        if stream not in self._workspaces:
            self._workspaces[stream] = Workspace(device)
        return self._workspaces[stream]

    # ---- for the reference ------------------------------------------------------------------------------------

    def plan(self, queries: int, row_step: int) -> ReadPlan:
        """The reads of the queries that are no padding, over pages of one token."""
        key = (queries, row_step)
        if key not in self._plans:
            starts = self.starts.tolist()
            lengths = [self.filled - start for start in starts]
            pages = [list(range(row * row_step + start, row * row_step + self.filled)) for row, start in enumerate(starts)]
            self._plans[key] = ReadPlan(pages, [min(queries, n) for n in lengths], lengths, 1, self.window)
        return self._plans[key]

    def real_queries(self, queries: int) -> Tensor:
        """`[B, queries]` bool, false for padding."""
        return self._made("real_queries", queries, 0)

    # ---- for Transformers' attention --------------------------------------------------------------------------

    def dense_mask(self, queries: int) -> Tensor | None:
        """`[B, 1, queries, L]` bool for `sdpa_attention_forward`; None where that needs no mask."""
        return None if self.is_whole(queries) else self._made("dense_mask", queries, 0)

    @property
    def is_narrow(self) -> bool:
        """Whether the window hides keys."""
        return self.window is not None and self.window < self.filled

    def is_whole(self, queries: int) -> bool:
        """Whether causality alone hides keys: one query sees all, or as many as keys each those up to its own."""
        return not (self.padded or self.is_narrow) and self.filled == self.kv_length and queries in (1, self.filled)

    def _made(self, name: str, first: int, second: int) -> Tensor:
        key = (name, first, second)
        if key not in self._tensors:
            self._tensors[key] = getattr(self, f"_make_{name}")(first, second)
        return self._tensors[key]

    def _make_starts(self, _: int, __: int) -> Tensor:
        return torch.zeros(self.rows, dtype=torch.int32, device=self.device)

    def _make_seq_lens(self, _: int, __: int) -> Tensor:
        if not self.padded:
            return torch.full((self.rows,), self.filled, dtype=torch.int32, device=self.device)
        return self.filled - self.starts

    def _make_cu_seqlens(self, queries: int, _: int) -> Tensor:
        return torch.arange(self.rows + 1, dtype=torch.int32, device=self.device) * queries

    def _make_page_table(self, row_step: int, page_size: int) -> Tensor:
        rows, device = self.rows, self.device
        pages = torch.arange(0, self.filled, page_size, dtype=torch.int32, device=device)[None]
        if rows > 1 and row_step:
            pages = torch.arange(0, rows * row_step, row_step, dtype=torch.int32, device=device)[:, None] + pages
        return pages + self.starts[:, None] if self.padded or len(pages) < rows else pages

    def _make_real_queries(self, queries: int, _: int) -> Tensor:
        return torch.arange(self.filled - queries, self.filled, device=self.device) >= self.starts[:, None]

    def _make_dense_mask(self, queries: int, _: int) -> Tensor:
        device = self.device
        key = torch.arange(self.kv_length, device=device)
        query = torch.arange(self.filled - queries, self.filled, device=device)[:, None]
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        return (seen & (key >= self.starts[:, None, None]))[:, None]


def unpadded_mask(rows: int, filled: int, device: torch.device) -> Tensor:
    """`[B, filled]` bool, true; launches nothing but for the first time on a device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # Memory made in a capture belongs to its graph.
    one = _make_true(device) if capturing else _kept_true(device)
    return one.expand(rows, filled)


def _make_true(device: torch.device) -> Tensor:
    # It outlives the mode that it is made in.
    with torch.inference_mode(False):
        return torch.ones(1, 1, dtype=torch.bool, device=device)


_kept_true = functools.lru_cache(maxsize=16)(_make_true)


@functools.lru_cache(maxsize=16)
def _kept_workspace(device: torch.device, stream: int) -> Workspace:
    from hf_fastattn.kernels.attention.workspace import Workspace

    return Workspace(device)


def layout_of(mask: Tensor) -> CausalLayout | None:
    """The layout that `mask` carries."""
    return getattr(mask, ATTRIBUTE, None)


def with_layout(mask: Tensor, layout: CausalLayout) -> Tensor:
    """`mask`, carrying `layout`; it lives as long as the mask, which is made anew every forward."""
    setattr(mask, ATTRIBUTE, layout)
    return mask
