"""The shapes of the benchmark of shared prefixes, their inputs, and the check that comes before every figure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fastattn.eval.kernel_speed.attention_cases import COLD_BYTES, DIM, GROUPS, HEADS, MAX_SETS
from hf_fastattn.kernels.variants.rotation import Rotation
from hf_fastattn.kernels.variants.variant import Variant

SUFFIX = 128
ROPE_BASE = 500_000.0


@dataclass(frozen=True)
class SharedShape:
    """One line of the table: `samples` rows of each of `prompts` prompts, decoding one token each.

    Attributes:
        prefix: tokens of each prompt, stored once.
        suffix: tokens of each row's own.
        kv_heads: key/value heads, for the same query heads.
        rope: keys are stored before RoPE, and rotated as they are read.
        flashinfer: milliseconds of FlashInfer 0.6.18 on an H200: its best without a cascade, its cascade as shipped, and
            the best that its kernels were composed to by hand.
    """

    prompts: int
    samples: int
    prefix: int
    suffix: int = SUFFIX
    kv_heads: int = GROUPS
    rope: bool = False
    flashinfer: tuple[float, float, float] | None = None

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def name(self) -> str:
        size = f"{self.prefix // 1024}k" if self.prefix % 1024 == 0 else str(self.prefix)
        found = f"{self.samples} of {size}" if self.prompts == 1 else f"{self.prompts} x {self.samples} of {size}"
        if self.kv_heads == HEADS:
            found += ", no grouped heads"
        return found + (", RoPE inside" if self.rope else "")

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in 16 bits."""
        return self.kv_heads * DIM * 2 * 2

    @property
    def stored_bytes(self) -> int:
        """Keys and values, each prompt once."""
        return (self.prompts * self.prefix + self.rows * self.suffix) * self.token_bytes

    @property
    def attended_bytes(self) -> int:
        """What reading them row by row would read."""
        return self.rows * (self.prefix + self.suffix) * self.token_bytes

    @property
    def operations(self) -> float:
        """Multiplications and additions of both products."""
        return 4.0 * self.rows * (self.prefix + self.suffix) * HEADS * DIM


def shared_shapes(small: bool) -> list[SharedShape]:
    """The shapes of the table; `small` ones for a device that is slow."""
    if small:
        return [
            SharedShape(1, 8, 512, 16),
            SharedShape(2, 4, 256, 16),
            SharedShape(1, 8, 512, 16, HEADS),
            SharedShape(1, 4, 128, 16, rope=True),
        ]
    return [
        SharedShape(1, 4, 8192, flashinfer=(0.029, 0.127, 0.029)),
        SharedShape(1, 16, 8192, flashinfer=(0.072, 0.142, 0.034)),
        SharedShape(1, 64, 8192, flashinfer=(0.252, 0.199, 0.061)),
        SharedShape(1, 64, 32768, flashinfer=(0.947, 0.521, 0.140)),
        SharedShape(1, 256, 8192, flashinfer=(0.982, 0.417, 0.171)),
        SharedShape(1, 256, 32768, flashinfer=(3.75, 0.734, 0.489)),
        SharedShape(8, 8, 4096, flashinfer=(0.140, 0.207, 0.073)),
        SharedShape(16, 16, 2048, flashinfer=(0.298, 0.434, 0.123)),
        SharedShape(64, 4, 2048, flashinfer=(0.312, 0.884, 0.193)),
        SharedShape(1, 256, 32768, kv_heads=HEADS),
        SharedShape(1, 256, 32768, rope=True),
    ]


@dataclass
class SharedInputs:
    """`sets` copies of pages and queries of a shape, and the batch as `paged_decode_shared` takes it."""

    shape: SharedShape
    q: list[Tensor]
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    page_table: Tensor
    seq_lens: Tensor
    group_starts: Tensor
    prefix_lens: Tensor
    rotation: Rotation | None

    @property
    def sets(self) -> int:
        return len(self.q)

    @property
    def variant(self) -> Variant | None:
        """RoPE inside attention, if the keys are stored before it."""
        turn = self.rotation
        return Variant(query_transform=turn, key_transform=turn, rope="inside") if turn else None


def make_shared_inputs(shape: SharedShape, page: int, device: torch.device, dtype: torch.dtype) -> SharedInputs:
    """Random queries, keys and values of `shape` in permuted pages of `page` tokens, those of a prompt once.

    Raises:
        ValueError: a prefix does not end with a page.
    """
    if shape.prefix % page:
        raise ValueError(f"prefix={shape.prefix} does not end with a page; use a page size that divides it, not {page}")
    sets = int(min(max(COLD_BYTES // shape.stored_bytes + 1, 1), MAX_SETS)) if device.type == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)
    shared, own = shape.prefix // page, -(-shape.suffix // page)
    count = shape.prompts * shared + shape.rows * own
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).int()
    prefixes = order[: shape.prompts * shared].view(shape.prompts, shared).repeat_interleave(shape.samples, 0)
    table = torch.cat((prefixes, order[shape.prompts * shared :].view(shape.rows, own)), 1)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    rotation = _rotation(shape.prefix + shape.suffix, device) if shape.rope else None
    return SharedInputs(
        shape,
        [normal(shape.rows, HEADS, DIM) for _ in range(sets)],
        [normal(count, page, shape.kv_heads, DIM) for _ in range(sets)],
        [normal(count, page, shape.kv_heads, DIM) for _ in range(sets)],
        table.to(device),
        torch.full((shape.rows,), shape.prefix + shape.suffix, dtype=torch.int32, device=device),
        torch.arange(0, shape.rows + 1, shape.samples, dtype=torch.int32, device=device),
        torch.full((shape.prompts,), shape.prefix, dtype=torch.int32, device=device),
        rotation,
    )


def _rotation(positions: int, device: torch.device) -> Rotation:
    rates = ROPE_BASE ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), rates).repeat(1, 2)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def dense_row(inputs: SharedInputs, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """q `[H, 1, D]`, k and v `[G, L, D]` of one row of the first set, rotated if they are not stored so."""
    pages, length = inputs.page_table[row].long(), inputs.shape.prefix + inputs.shape.suffix
    q = inputs.q[0][row][:, None]
    k, v = (held[0][pages].flatten(0, 1)[:length].transpose(0, 1) for held in (inputs.k_pages, inputs.v_pages))
    return _turned(q, inputs.rotation, length - 1), _turned(k, inputs.rotation, 0), v


def _turned(x: Tensor, rotation: Rotation | None, first: int) -> Tensor:
    """`x: [heads, tokens, D]`, of tokens from position `first` on."""
    if rotation is None:
        return x
    cos, sin = (part[first : first + x.shape[1]] for part in (rotation.cos, rotation.sin))
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)


def shared_agrees(inputs: SharedInputs, out: Tensor) -> bool:
    """FlashAttention's criterion on the first and the last row: at most twice PyTorch's error in the same dtype."""
    for row in (0, inputs.shape.rows - 1):
        q, k, v = (x[None] for x in dense_row(inputs, row))
        plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0]
        wide = torch.float64 if q.dtype == torch.float32 else torch.float32
        exact = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), enable_gqa=True)[0]
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        if (out[row][:, None] - exact).abs().max() > 2 * (plain - exact).abs().max() + floor:
            return False
    return True
