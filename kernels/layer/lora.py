"""LoRA (Hu et al., 2021) in the launch of the product that it changes: `y = x W^T + s (x A^T) B^T`.

The first programs of the launch shrink: each multiplies a part of the columns of x with those of one `A: [r, K]`, and
stores its sums. The others multiply with W as ever, read the parts until all are there, add them up in fixed order, and
expand with their rows of `B: [N, r]` before they store: so results are bitwise repeatable, and LoRA costs no launch.
A GPU starts the programs of a launch in the order of their numbers, so whoever is waited for runs already.

Several adapters of one weight are stacked into one, of the sum of their ranks: the shrinking programs multiply each sum by
the scale of the adapter that it belongs to, and set it to 0 for tokens that have another adapter.

Sums are fp32 throughout, rounded once with the product. The plain PyTorch version, rounded as PEFT rounds, is
`reference.low_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import DTYPES, power_of_2
from hf_fastattn.kernels.layer.lora_programs import MISSING, SEGMENTS, SUMS, MemberPointers, Operands

MOST_RANK = 128
# The matrix unit multiplies no fewer.
LEAST_RANK = 16
# Sums that are set to MISSING at once: those of a whole step of a small model, 2 MB.
AT_ONCE = 2**19
# Columns that are worth a program of their own, and the most such programs of an A. The products of several tokens nearly
# fill a Hopper GPU, and memory answers the next step of a program late while all others read weights: down of 8,192 columns
# is quicker with 16 programs, some of which belong to a second wave, than with the eight that fit beside its 256 (H200,
# eight tokens: by 1 us of 11). With more than 16 tokens registers do not hold so many sums.
PART_COLUMNS, MOST_PARTS = 256, 16
PART_COLUMNS_OF_TOKENS, MOST_PARTS_OF_TOKENS, MOST_PARTS_OF_MANY_TOKENS = 512, 16, 8
# Rows of A a program, at most, where the matrix unit multiplies: wgmma, from 64 rows on, would take more registers.
MOST_ROWS = 32
# Columns of B that the matrix unit multiplies at once, at most: registers hold them beside the sums.
MOST_COLUMNS = 32


@dataclass(frozen=True)
class Members:
    """Whose each row of a stacked A, and column of B, is.

    Attributes:
        scales: `[r]` fp32, those of the adapters that the rows belong to.
        numbers: `[r]` int32, of these adapters. A token has what the adapter of its own number adds to it.
    """

    scales: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Adapter:
    """`scale (x A^T) B^T`, to add to the product with a weight `[N, K]`.

    Attributes:
        a: `[r, K]`, fp32, fp16 or bf16, contiguous, r up to 128.
        b: `[N, r]`, likewise.
        members: of several adapters, stacked; `scale` is 1 then.
    """

    a: Tensor
    b: Tensor
    scale: float
    members: Members | None = None


@dataclass(frozen=True)
class LoraTile:
    """Launch configuration of the shrinking programs.

    Attributes:
        block_k: columns a step; of each segment, for several tokens.
        parts: programs that share the columns of an A, at most.
    """

    block_k: int
    parts: int


class LoraSums:
    """Room for the sums of launches with adapters, each launch's own: no launch has to reset it for the next.

    A forward makes one of these, and a captured graph records its making: sums are MISSING again at every replay.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._free = torch.empty(0, dtype=torch.int32, device=device)

    def take(self, count: int) -> Tensor:
        """`[count]` sums of the next launch, MISSING all."""
        if self._free.numel() < count:
            self._free = torch.full((max(count, AT_ONCE),), MISSING.value, dtype=torch.int32, device=self._free.device)
        taken, self._free = self._free[:count], self._free[count:]
        return taken


def check_adapters(
    x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Adapter | None], numbers: Tensor | None = None
) -> None:
    """Raise a `ValueError` unless there is an adapter, or None, for each weight, and at least one that fits."""
    held = [adapter for adapter in adapters if adapter is not None]
    if len(adapters) != len(weights) or not held:
        raise ValueError(f"{len(adapters)} adapters, {len(held)} of them not None, for {len(weights)} weights")
    if len({numbers is None, *(adapter.members is None for adapter in held)}) > 1:
        raise ValueError("the adapters of a launch must all be stacked, with numbers for the tokens, or none of them")
    if numbers is not None and (numbers.shape != x.shape[:1] or numbers.dtype is not torch.int32):
        raise ValueError(f"numbers {tuple(numbers.shape)}, {numbers.dtype}, must be [T] = {[x.shape[0]]} and int32")
    dtype = held[0].a.dtype
    for weight, adapter in zip(weights, adapters, strict=True):
        if adapter is None:
            continue
        (rank, k), n = adapter.a.shape, weight.shape[0]
        if k != x.shape[1] or adapter.b.shape != (n, rank) or not 0 < rank <= MOST_RANK:
            raise ValueError(
                f"A {tuple(adapter.a.shape)} and B {tuple(adapter.b.shape)} must be [r, {x.shape[1]}] and [{n}, r] "
                f"with r from 1 to {MOST_RANK}"
            )
        if dtype not in DTYPES or not adapter.a.dtype == adapter.b.dtype == dtype:
            raise ValueError(f"A and B are {adapter.a.dtype} and {adapter.b.dtype}; all must be one among {DTYPES}")
        if not adapter.a.is_contiguous() or not adapter.b.is_contiguous():
            raise ValueError("A and B must be contiguous")
        of = adapter.members
        if of is not None and not (of.scales.shape == of.numbers.shape == (rank,) and of.scales.dtype is torch.float32):
            raise ValueError(f"{tuple(of.scales.shape)} scales, {of.scales.dtype}, for A of {rank} rows; must be fp32")


def lora_tile(block_t: int, k: int, rank: int, room: int = 0) -> LoraTile:
    """The tile for `block_t` tokens, padded, and A of `rank` rows, padded.

    Args:
        room: programs for each A that a GPU runs at once beside those that multiply with W: up to so many do not make the
            launch longer than the wave of these, and the sums are there sooner.
    """
    # Registers hold a tile of fp32, and for several tokens what the matrix unit makes of a block of rows.
    block_k = 4096 // rank if block_t == 1 else 64 if rank <= 16 and block_t <= 32 else 32 if block_t <= 32 else 16
    columns, most = (PART_COLUMNS, MOST_PARTS) if block_t == 1 else (PART_COLUMNS_OF_TOKENS, MOST_PARTS_OF_TOKENS)
    if block_t > 16:
        most = MOST_PARTS_OF_MANY_TOKENS
    parts = min(k // columns, most) if room <= most or block_t == 1 else min(k // PART_COLUMNS, room, MOST_PARTS)
    return LoraTile(block_k, max(parts, 1))


def operands(
    x: Tensor, adapters: Sequence[Adapter | None], block_t: int, sums: LoraSums | None, tile: LoraTile | None,
    numbers: Tensor | None = None, room: int = 0,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """The shrinking programs of a launch, and its keywords for LoRA.

    Args:
        x: `[T, K]`.
        adapters: as `check_adapters` has checked them.
        block_t: T, padded.
        sums: where the sums go; made if None.
        tile: for measuring; by default `lora_tile`'s.
        numbers: `[T]` int32, of the tokens' adapters, where these are stacked.
        room: programs that a GPU runs at once beside those that multiply with W.
    """
    ranks = [0 if adapter is None else adapter.a.shape[0] for adapter in adapters]
    rank = power_of_2(max(*ranks, LEAST_RANK))
    constants = _constants(
        x.shape[1], ranks, rank, block_t, tile or lora_tile(block_t, x.shape[1], rank, room // len(ranks))
    )
    spare = next(adapter for adapter in adapters if adapter is not None)
    if block_t > 1:
        wide = spare.a.dtype == torch.float32
        exact = "ieee" if x.dtype == torch.float32 else "tf32x3"
        constants |= {"SHRINK_PRECISION": exact if wide else "tf32", "EXPAND_PRECISION": exact}
        # Products in fp32 leave no registers for B.
        constants["EARLY"] = x.element_size() == 2 and constants["COLUMNS"] == rank
    held = [adapter or spare for adapter in (*adapters, *[None] * (3 - len(adapters)))]
    copies = SUMS.value if block_t == 1 else 1
    summed = (sums or LoraSums(x.device)).take(copies * len(ranks) * constants["PARTS"] * block_t * rank)
    tensors = (*(one.a for one in held), *(one.b for one in held))
    scales = (float(one.scale) for one in held)
    lora = Operands._make((*tensors, *scales, summed))
    members = None
    if numbers is not None:
        of = [one.members for one in held if one.members is not None]
        members = MemberPointers._make((*(one.scales for one in of), *(one.numbers for one in of), numbers))
    return constants["SHRINKERS"], {"lora": lora, "members": members, **constants}


def _constants(k: int, ranks: list[int], rank: int, block_t: int, tile: LoraTile) -> dict[str, Any]:
    """What is known when the launch is compiled, for A of `ranks` rows, padded to `rank`, and k columns."""
    step = tile.block_k if block_t == 1 else tile.block_k * SEGMENTS.value
    steps = -(-k // step)
    # Steps a part, and then parts: rounded so that no part is empty.
    part = -(-steps // min(tile.parts, steps))
    parts = -(-steps // part)
    row_blocks = 1 if block_t == 1 else -(-rank // MOST_ROWS)
    constants = {
        "RANKS": (*ranks, *[0] * (3 - len(ranks))),
        "SAME": len(set(ranks)) == 1,
        "RANK": rank,
        "PARTS": parts,
        "SHRINK_PART": part * step,
        "SHRINK_K": tile.block_k,
        "SHRINKERS": parts * row_blocks * len(ranks),
    }
    if block_t == 1:
        return constants | {"ROOM": power_of_2(parts)}
    columns = min(rank, MOST_COLUMNS if block_t <= 32 else MOST_COLUMNS // 2)
    return constants | {"SHRINK_ROWS": rank // row_blocks, "COLUMNS": columns}
