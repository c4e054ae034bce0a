"""`StaticInputs`: device tensors of fixed address that a recorded forward of `ForwardGraphs` reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.module_checks import submodules
from hf_fastattn.graphs.upload_ring import UploadRing
from hf_fastattn.kernels.launch import power_of_2

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace

# Views begin at multiples of this many int32: kernels are compiled for the alignment of their pointers.
ALIGNMENT = 64
MIN_COLUMNS = 64
# (largest size, padding multiple) of each bucket of captured forwards of several tokens a row.
BUCKETS = ((16, 4), (64, 16), (256, 64), (2048, 128), (4096, 256), (8192, 512))
# Of every model so many tokens are captured, of small ones more: until the GPU is busy for about as long as the launches of
# a layer take, 300 us and more. An H200 multiplies so many 16-bit weights with tokens meanwhile.
FEWEST_CAPTURED, MOST_CAPTURED = 1024, BUCKETS[-1][0]
PRODUCTS_A_LAYER = 9 * 10**10
# Arguments that static inputs hold, and those that do not change what is computed.
STATIC = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "is_causal",
)  # fmt: skip


@dataclass(frozen=True)
class ForwardShape:
    """What two forwards must have in common to share static inputs.

    Attributes:
        rows: of the batch (B).
        bucket: tokens that those of all rows are padded to, packed as `[1, bucket]`; None for a decode step, `[B, 1]`.
            Padding tokens are those of a padding row, which sees no key.
        tokens: `input_ids` or `inputs_embeds`, with its `dtype` and what follows `[B, S]` in its shape.
        axes: `()` for position ids `[B, S]`, `(n,)` for `[n, B, S]`.
        device: of all tensors.
    """

    rows: int
    bucket: int | None
    tokens: str
    dtype: torch.dtype
    features: tuple[int, ...]
    axes: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(arguments: dict[str, Any], batch: Batch, is_decode: bool) -> ForwardShape:
        """That of a forward.

        Args:
            arguments: of the decoder's forward, tokens `[B, S]`, or `[1, T]` where padding was taken out.
            batch: of the cache: its T tokens.
            is_decode: one new token a row.
        """
        name = "input_ids" if arguments["input_ids"] is not None else "inputs_embeds"
        tokens, positions = arguments[name], arguments["position_ids"]
        axes = () if positions is None else tuple(positions.shape[:-2])
        bucket = None if is_decode else bucket_of_tokens(batch.tokens)
        return ForwardShape(batch.rows, bucket, name, tokens.dtype, tuple(tokens.shape[2:]), axes, tokens.device)

    @property
    def all_rows(self) -> int:
        """Rows of the tables."""
        return self.rows if self.bucket is None else self.rows + 1

    @property
    def leading(self) -> tuple[int, int]:
        """The first two dimensions of tokens and hidden states."""
        return (self.rows, 1) if self.bucket is None else (1, self.bucket)


def is_captured(decoder: Any, tokens: int) -> bool:
    """Whether forwards of so many tokens are captured of this decoder."""
    # To look at its weights takes the host as long as many launches.
    return tokens <= FEWEST_CAPTURED or (tokens <= MOST_CAPTURED and tokens <= most_tokens(decoder))


def most_tokens(decoder: Any) -> int:
    """Tokens of the largest forward that is captured of this decoder."""
    layers = getattr(decoder, "layers", None)
    # Not by `parameters()`, which takes the host as long as ten launches: asked before every prompt.
    modules = submodules(layers) if isinstance(layers, nn.Module) else ()
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    if not weights:
        return FEWEST_CAPTURED
    # In fp32 a GPU is busy for several times as long.
    narrow = weights[0].element_size() == 2 or region_dtype(weights[0].device) is not None
    products = PRODUCTS_A_LAYER // (1 if narrow else 8)
    a_layer = sum(parameter.numel() for parameter in weights) // decoder.config.num_hidden_layers
    return min(max(products // max(a_layer, 1), FEWEST_CAPTURED), MOST_CAPTURED)


def bucket_of_tokens(tokens: int) -> int:
    """The bucket of a captured forward of `tokens`, at most MOST_CAPTURED: few buckets, little padding."""
    step = next(step for upto, step in BUCKETS if tokens <= upto)
    return -(-tokens // step) * step


class StaticInputs:
    """Tokens, positions, and in one packed int32 tensor slots, lengths and page tables.

    Args:
        shape: of the forward.
        columns: pages a row that there is room for.
        windows: of the cache's page tables.
    """

    def __init__(self, shape: ForwardShape, columns: int, windows: Iterable[int | None]) -> None:
        self.shape = shape
        self.columns = columns
        self.windows = tuple(windows)
        rows, device = shape.all_rows, shape.device
        self._places = rows if shape.bucket is None else shape.bucket
        self._stride, self._row_stride = _aligned(self._places), _aligned(rows + 1)
        # The head changes at every forward: slots by window, lengths, cu_seqlens. Page tables, behind it, change rarely.
        self._head = self._stride * len(self.windows) + 2 * self._row_stride
        self._table = _aligned(rows * columns)
        size = self._head + self._table * len(self.windows)
        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self.tokens = torch.zeros(*shape.leading, *shape.features, dtype=shape.dtype, device=device)
            self.position_ids = torch.zeros(*shape.axes, *shape.leading, dtype=torch.int64, device=device)
            # Transformers passes a 4-D mask on as it is; our attention ignores it.
            self.mask = torch.zeros(1, 1, 1, 1, device=device)
            self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._uploaded: tuple[int, ...] = ()

    @functools.cached_property
    def _staging(self) -> UploadRing:
        # Pinning memory takes milliseconds, and inputs that follow others are not written from the host.
        return UploadRing(len(self._packed), self.shape.device)

    def on(self, device: torch.device) -> StaticInputs:
        """What layers on another device read of these inputs, all but tokens, once they `follow` them."""
        shape = replace(self.shape, tokens="input_ids", dtype=torch.int64, features=(), device=device)
        return StaticInputs(shape, self.columns, self.windows)

    def follow(self, other: StaticInputs) -> None:
        """Hold what `other`, on another device, holds; nobody waits on the host."""
        self.position_ids.copy_(other.position_ids, non_blocking=True)
        self._packed.copy_(other._packed, non_blocking=True)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the decoder's forward."""
        return {
            "input_ids": None,
            "inputs_embeds": None,
            self.shape.tokens: self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": self.mask,
        }

    def batch(self, backend: str, batch_invariant: bool, workspace: Workspace) -> Batch:
        """A batch whose tensors are these."""
        shape, packed, places = self.shape, self._packed, dict(zip(self.windows, range(len(self.windows)), strict=True))
        tensors = BatchTensors(
            slots={window: packed[self._slots(place)] for window, place in places.items()},
            page_tables={
                window: packed[self._pages(place)].view(shape.all_rows, self.columns) for window, place in places.items()
            },
            seq_lens=packed[self._lengths()],
            cu_seqlens=None if shape.bucket is None else packed[self._begins()],
        )
        options = BatchOptions(backend, batch_invariant, workspace=workspace)
        return Batch.static(tensors, shape.all_rows if shape.bucket is None else shape.bucket, options)

    def _slots(self, place: int) -> slice:
        return slice(place * self._stride, place * self._stride + self._places)

    def _lengths(self) -> slice:
        start = self._stride * len(self.windows)
        return slice(start, start + self.shape.all_rows)

    def _begins(self) -> slice:
        start = self._stride * len(self.windows) + self._row_stride
        return slice(start, start + self.shape.all_rows + 1)

    def _pages(self, place: int) -> slice:
        start = self._head + place * self._table
        return slice(start, start + self.shape.all_rows * self.columns)

    def write(self, arguments: dict[str, Any], cache: PagedCache, batch: Batch) -> None:
        """Put the values of a forward in place, without a look at the device.

        Args:
            arguments: of the decoder's forward.
            cache: its tables.
            batch: of the forward.
        """
        self._write_tokens(arguments, cache, batch)
        host = self._staging.next()
        lengths = np.array(batch.known.seq_lens, np.int32)
        host[self._lengths()] = 0
        host[self._lengths()][: len(lengths)] = lengths
        tables: list[NDArray[np.int32]] = []
        versions: list[int] = []
        for place, window in enumerate(self.windows):
            table = cache.tables[window]
            if self.shape.bucket is None:
                host[self._slots(place)] = table.newest_slots(lengths)
            else:
                slots = host[self._slots(place)]
                slots[: batch.tokens] = batch.known.slots[window]
                # A slot of -1: the padding tokens are written nowhere.
                slots[batch.tokens :] = -1
            pages, version = table.as_array()
            tables.append(pages)
            versions.append(version)
        if self.shape.bucket is not None:
            host[self._begins()] = np.concatenate(([0], np.cumsum(batch.known.query_lens), [self.shape.bucket]))
        count = self._head
        if self._uploaded != tuple(versions):
            for place, pages in enumerate(tables):
                used = min(pages.shape[1], self.columns)
                held = host[self._pages(place)].reshape(self.shape.all_rows, self.columns)
                held[: len(pages), :used] = pages[:, :used]
            count = self._packed.shape[0]
        self._staging.send(self._packed, count)
        self._uploaded = tuple(versions)

    def _write_tokens(self, arguments: dict[str, Any], cache: PagedCache, batch: Batch) -> None:
        tokens, positions = arguments[self.shape.tokens], arguments["position_ids"]
        if positions is None:
            past = cache.past_columns
            positions = torch.arange(past, past + tokens.shape[1], device=self.shape.device)[None]
        if self.shape.bucket is None:
            self.tokens.copy_(tokens)
            self.position_ids.copy_(positions)
            return
        # Padding positions keep the ids, or embeddings, of an earlier forward; their outputs are not read.
        self.tokens[0, : batch.tokens].copy_(tokens.flatten(0, 1))
        positions = positions.expand(*positions.shape[:-2], *tokens.shape[:2])
        self.position_ids[..., 0, : batch.tokens].copy_(positions.flatten(-2))


def why_not_static(decoder: Any, arguments: dict[str, Any], kwargs: dict[str, Any]) -> str | None:
    """Why a forward asks for more than static inputs can say; None if it doesn't."""
    for name, value in (*arguments.items(), *kwargs.items()):
        if name not in STATIC and value is not None and value is not False:
            return f"{name} is given"
    if kwargs.get("use_cache") is False or kwargs.get("is_causal") is False:
        return "use_cache=False or is_causal=False"
    if decoder.config.output_hidden_states and kwargs.get("output_hidden_states") is not False:
        return "output_hidden_states is set"
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    positions = arguments["position_ids"]
    if positions is not None and (positions.device != tokens.device or positions.shape[-1] != tokens.shape[1]):
        return f"position_ids of shape {tuple(positions.shape)} on {positions.device}"
    if torch.is_grad_enabled() and tokens.requires_grad:
        return "gradients are needed"
    return None


def columns_for(cache: PagedCache, seq_lens: list[int]) -> tuple[int, int]:
    """Pages a row that a forward needs, and those worth making room for."""
    size = cache.groups.page_size
    needed = -(-max(seq_lens) // size)
    return needed, max(power_of_2(max(needed, -(-cache.room // size))), MIN_COLUMNS)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
