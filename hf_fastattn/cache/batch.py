"""`Batch`: one forward over a paged cache, as data shared by all layers, and its two operations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.cache.batch_tensors import BatchTensors, HostBatch
from hf_fastattn.cache.tables_source import TablesSource
from hf_fastattn.kernels.attention import reference, rope_reference
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.backends import choose_backend

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.work_list import WorkLists
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.kernels.variants.hooks import CompiledVariant
    from hf_fastattn.kernels.variants.prepared import PreparedVariant
    from hf_fastattn.kernels.variants.rotation import RotaryFrequencies


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of rows on a device; see `kernels.attention.shared_prefix.paged_decode_shared`.

    Attributes:
        group_starts: `[levels, groups + 1]` int32.
        prefix_lens: `[levels, groups]` int32 tokens.
        max_group_rows: about how many rows the largest group has.
    """

    group_starts: Tensor
    prefix_lens: Tensor
    max_group_rows: int


@dataclass(frozen=True)
class BatchOptions:
    """What a batch's operations run on.

    Attributes:
        backend: `FastAttnConfig.backend`.
        batch_invariant: `FastAttnConfig.batch_invariant`.
        workspaces: by device and stream; live with the model's pages.
        workspace: the one to use instead, whatever the stream.
    """

    backend: str = "auto"
    batch_invariant: bool = False
    workspaces: dict[tuple[torch.device, int], Workspace] = field(default_factory=dict)
    workspace: Workspace | None = None


@dataclass(frozen=True)
class Batch:
    """The new tokens of a forward: how many there are, where they are written and what they read.

    Made by `from_host()`, or by `static()` for a captured forward, whose tensors hold other values at each replay.

    Attributes:
        rows: of the batch (B).
        tokens: new tokens of all rows (T), or the bucket that they are padded to.
        max_query_len: the most new tokens of a row.
        is_decode: every row has one new token.
        options: backend and its mode.
        host: the rows as the host knows them; None where only the device does.
        shared: prefixes that layers without a window read once for all their rows, in decode.
        short: most query heads for which the rows have few keys, by `kernels.attention.configs.short_heads`, one key of each
            new, and launches under way write nothing but these; 0 if that is not so.
        settled: no launch under way writes lengths or page tables.
    """

    rows: int
    tokens: int
    max_query_len: int
    is_decode: bool
    options: BatchOptions
    host: HostBatch | None = None
    shared: SharedPrefixes | None = None
    short: int = 0
    settled: bool = False
    _tensors: dict[torch.device, BatchTensors] = field(default_factory=dict)
    _rope: dict[torch.device, tuple[TablesSource, Tensor, Tensor]] = field(default_factory=dict)
    _work_lists: WorkLists = field(default_factory=dict)
    # By device: whether the last layer took the launch for short rows.
    _took_short: dict[torch.device, bool] = field(default_factory=dict)

    @staticmethod
    def from_host(host: HostBatch, options: BatchOptions) -> Batch:
        """The batch of a forward whose lengths and pages the host knows; its tensors are made when they are asked for."""
        counts = host.query_lens
        return Batch(len(counts), sum(counts), max(counts), all(count == 1 for count in counts), options, host)

    @staticmethod
    def static(
        tensors: BatchTensors,
        tokens: int,
        options: BatchOptions,
        shared: SharedPrefixes | None = None,
        short: int = 0,
        settled: bool = False,
    ) -> Batch:
        """The batch of a captured forward.

        Args:
            tensors: that stay where they are.
            tokens: the bucket: one a row in decode, else as many as all rows together may have, each row up to all.
        """
        lengths, decode = tensors.seq_lens, tensors.cu_seqlens is None
        return Batch(
            len(lengths), tokens, 1 if decode else tokens, decode, options,
            shared=shared, short=short, settled=settled, _tensors={lengths.device: tensors},
        )  # fmt: skip

    @property
    def known(self) -> HostBatch:
        """`host` of a batch that was made by `from_host()`."""
        assert self.host is not None
        return self.host

    def on(self, device: torch.device) -> BatchTensors:
        """What kernels read, made once for all layers on the device."""
        held = self._tensors.get(device)
        if held is None:
            held = self._tensors[device] = self.known.on(device)
        return held

    def rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin as `[T, rotary dims]`, from the model's `[1 or B, S, rotary dims]`."""
        held = self._rope.get(cos.device)
        if held is None or not held[0].is_still(cos, sin):
            flat = []
            for table in (cos, rope_reference.signed_sin(sin)):
                rows = self.tokens // table.shape[1]
                flat.append(table.expand(rows, -1, -1).reshape(self.tokens, -1))
            held = (TablesSource(cos, sin), flat[0], flat[1])
            self._rope[cos.device] = held
        return held[1], held[2]

    def hold_rope(self, cos: Tensor, sin: Tensor, signed_sin: Tensor) -> None:
        """Have `rope()` give these for cos and sin, all `[B, S, rotary dims]` of the T tokens."""
        self._rope[cos.device] = (TablesSource(cos, sin), cos.view(self.tokens, -1), signed_sin.view(self.tokens, -1))

    def places(self, rotation: RotaryFrequencies, device: torch.device) -> tuple[Tensor, Tensor]:
        """`rotation.places` of the new tokens `[T]`, made once for all layers; positions are places in the cache."""
        held = self._rope.get(device)
        if held is None or not held[0].is_still(rotation.table):
            tensors = self.on(device)
            if tensors.cu_seqlens is None:
                position = tensors.seq_lens - 1
            else:
                ends, token = tensors.cu_seqlens[1:], torch.arange(self.tokens, device=device)
                row = torch.searchsorted(ends, token, right=True, out_int32=True).clamp(max=self.rows - 1)
                position = tensors.seq_lens[row] - ends[row] + token
            # Rows that take no part have no token.
            held = (TablesSource(rotation.table), *rotation.places(position.clamp(min=0).long()))
            self._rope[device] = held
        return held[1], held[2]

    def forget_tables(self) -> None:
        """Let go of what one layer made for the others: the tables of `rope()`, lists of attention's tiles."""
        self._rope.clear()
        self._work_lists.clear()

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
        """[qk-norm] + RoPE + append of the new tokens `[T, heads, D]`; see `rope_reference.rope_append`.

        Args:
            cos: from `rope()`; `sin` likewise.
            window: of the layer, which says where its pages are.
            norms: `q_norm`, `k_norm`, `eps`, `unit_offset`.

        Returns:
            `[T, H, D]` rotated queries.
        """
        slots = self.on(k.device).slots[window]
        if self._backend_of(q) != "reference":
            from hf_fastattn.kernels.attention import append

            return append.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, **norms)
        return rope_reference.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, **norms)

    def append_and_attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        window: int | None,
        *,
        scale: float,
        variant: PreparedVariant | None = None,
        **norms: Any,
    ) -> Tensor:
        """`rope_append`, then `attend`: one launch for a step of one row or of few short ones, two for everything else."""
        self._took_short[q.device] = is_short = self.is_short_step(q, k_pages, variant)
        if is_short:
            from hf_fastattn.kernels.attention.short_row import short_row

            held = self.on(q.device)
            return short_row(
                q, k, v, cos, sin, k_pages, v_pages, held.slots[window], held.page_tables[window], held.seq_lens,
                scale=scale, window=window, workspace=self._workspace(q.device), keys_settled=True, **norms,
            )  # fmt: skip
        if self._decode_appends(q, k_pages, variant):
            from hf_fastattn.kernels.attention.decode import paged_decode
            from hf_fastattn.kernels.attention.new_token import NewToken

            held = self.on(q.device)
            new = NewToken(k, v, cos, sin, held.slots[window], settled=self.settled, **norms)
            out, _ = paged_decode(
                q, k_pages, v_pages, held.page_tables[window], held.seq_lens, scale=scale, window=window, new=new,
                workspace=self._workspace(q.device),
            )  # fmt: skip
            return out
        q = self.rope_append(q, k, v, cos, sin, k_pages, v_pages, window, **norms)
        return self.attend(q, k_pages, v_pages, window, scale=scale, variant=variant)

    def _decode_appends(self, q: Tensor, k_pages: Tensor, variant: PreparedVariant | None) -> bool:
        """Whether the launch that attends to a single row appends as well."""
        if not self.is_decode or not self._may_append(q, variant):
            return False
        from hf_fastattn.kernels.attention.decode import appends

        return appends(q, k_pages)

    def _may_append(self, q: Tensor, variant: PreparedVariant | None) -> bool:
        """Whether a launch that attends may append: Triton's kernels, each row by itself, and nothing between the two."""
        plain = self.shared is None and variant is None and not self.options.batch_invariant
        return plain and self._backend_of(q) != "reference"

    def leaves_l1(self, device: torch.device) -> bool:
        """Whether attention beside a layer's products leaves multiprocessors' memory to the L1 cache, as far as is known.

        Only the launch for short rows needs hardly any shared memory.
        """
        return self._took_short.get(device, self.short > 0)

    def is_short_step(self, q: Tensor, k_pages: Tensor, variant: PreparedVariant | None) -> bool:
        """Whether `append_and_attend` takes the launch for short rows with queries, pages and a variant like these."""
        if not self.short or not self._may_append(q, variant):
            return False
        from hf_fastattn.kernels.attention.short_row import takes

        return takes(q, k_pages, self.short)

    def attend(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        window: int | None,
        *,
        scale: float,
        variant: PreparedVariant | None = None,
    ) -> Tensor:
        """Causal attention of the new queries `[T, H, D]` over the pages of their rows.

        Args:
            variant: of the layer, if it has one.

        Returns:
            `[T, H, D]` in q's dtype.
        """
        if self._backend_of(q) != "reference":
            if self.shared is not None and window is None and (variant is None or variant.window is None):
                return self._attend_shared(q, k_pages, v_pages, self.shared, scale, variant)
            return self._attend_triton(q, k_pages, v_pages, window, scale, variant)
        plan = self.known.plans[window]
        if variant is not None:
            return variant_attention(q, k_pages, v_pages, plan, variant.variant, scale=scale)[0]
        return reference.paged_output(q, k_pages, v_pages, plan, scale=scale)

    def _attend_triton(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        window: int | None,
        scale: float,
        variant: PreparedVariant | None,
    ) -> Tensor:
        from hf_fastattn.kernels.attention.paged import paged_attention

        held = self.on(q.device)
        out, _ = paged_attention(
            q, k_pages, v_pages, held.page_tables[window], held.cu_seqlens, held.seq_lens,
            max_query_len=self.max_query_len, scale=scale, window=window, variant=_compiled(variant, q.device),
            workspace=self._workspace(q.device), hopper=self._backend_of(q) == "hopper",
            batch_invariant=self.options.batch_invariant, work_lists=self._work_lists,
        )  # fmt: skip
        return out

    def _attend_shared(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        shared: SharedPrefixes,
        scale: float,
        variant: PreparedVariant | None,
    ) -> Tensor:
        from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared

        held = self.on(q.device)
        out, _ = paged_decode_shared(
            q, k_pages, v_pages, held.page_tables[None], held.seq_lens, shared.group_starts, shared.prefix_lens,
            max_group_rows=shared.max_group_rows, scale=scale, workspace=self._workspace(q.device),
            variant=_compiled(variant, q.device), hopper=self._backend_of(q) == "hopper",
            work_lists=self._work_lists,
        )  # fmt: skip
        return out

    def _backend_of(self, q: Tensor) -> str:
        options = self.options
        return choose_backend(options.backend, q.device, q.dtype, q.shape[-1], options.batch_invariant)[0]

    def _workspace(self, device: torch.device) -> Workspace:
        from hf_fastattn.kernels.attention.workspace import Workspace

        if self.options.workspace is not None:
            return self.options.workspace
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream)
        held = self.options.workspaces
        if key not in held:
            held[key] = Workspace(device)
        return held[key]


def _compiled(variant: PreparedVariant | None, device: torch.device) -> CompiledVariant:
    from hf_fastattn.kernels.variants.hooks import PLAIN

    return PLAIN if variant is None else variant.compiled(device)
