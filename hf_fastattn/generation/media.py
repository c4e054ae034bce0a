"""Which images, videos and sounds the rows of a prompt have, and which of them are the same.

A row owns as many as its placeholder tokens take. They are compared by content: sums of their bits find candidates, whose
bits are then compared on the device; the host waits twice for each input, however many there are, unless sums mislead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Modality:
    """Names of the inputs of one kind.

    Attributes:
        main: `[units, ...]`, or with a grid the patches of all units, one after the other.
        grid: `[units, 3]`, patches of each unit by time, height and width.
        beside: others, `[units, ...]`; what they hold may decide how many tokens a unit takes.
    """

    main: str
    grid: str | None
    beside: tuple[str, ...]


MODALITIES: dict[str, Modality] = {
    "image": Modality("pixel_values", "image_grid_thw", ("image_sizes", "pixel_attention_mask")),
    "video": Modality("pixel_values_videos", "video_grid_thw", ("second_per_grid_ts", "video_second_per_grid")),
    "audio": Modality("input_features", None, ("feature_attention_mask", "input_features_mask", "audio_feature_lengths")),
}
INPUTS = frozenset(
    name for known in MODALITIES.values() for name in (known.main, known.grid, *known.beside) if name is not None
)


class Unknown(Exception):
    """It cannot be told which row owns what; the message says why."""


@dataclass(frozen=True)
class Media:
    """The images (or videos, or sounds) of a batch.

    Attributes:
        inputs: by name, `[units, ...]`, the main one in parts of `sizes` rows.
        main: name of the main input.
        sizes: rows of the main input that each unit has.
        owners: units of each row of the batch.
    """

    inputs: dict[str, Tensor]
    main: str
    sizes: list[int]
    owners: list[range]

    def kinds(self) -> list[tuple[int, ...]]:
        """For each row of the batch, numbers of its units: equal where the contents are."""
        single = [1] * len(self.sizes)
        columns = [_kinds(value, self.sizes if name == self.main else single) for name, value in self.inputs.items()]
        units = [tuple(column[unit] for column in columns) for unit in range(len(self.sizes))]
        return [tuple(kind for unit in owned for kind in units[unit]) for owned in self.owners]

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The inputs of these rows."""
        units = [unit for row in rows for unit in self.owners[row]]
        starts = [0, *accumulate(self.sizes)]
        parts = [part for unit in units for part in range(starts[unit], starts[unit + 1])]
        return {name: take(tensor, parts if name == self.main else units) for name, tensor in self.inputs.items()}


def media_of(
    modality: str, inputs: Mapping[str, Any], input_ids: Tensor, config: Any, lengths: list[int] | None = None
) -> Media | None:
    """The units of a modality in `inputs`, and the rows that own them; None if there are none.

    Args:
        modality: of `MODALITIES`.
        inputs: by name, beside others.
        input_ids: `[B, S]` with the placeholders.
        config: of the model: placeholder tokens, and how many patches are merged into a token.
        lengths: tokens that each unit takes, if that is known.

    Raises:
        Unknown: the placeholders do not tell.
    """
    known = MODALITIES[modality]
    main = inputs.get(known.main)
    if not isinstance(main, Tensor) or not main.ndim:
        return None
    grid = None if known.grid is None else inputs.get(known.grid)
    names = (known.main, *known.beside) if grid is None else (known.main, known.grid, *known.beside)
    held = {name: value for name in names if isinstance(value := inputs.get(name or ""), Tensor) and value.ndim and name}
    counts = placeholders(modality, input_ids, config)
    if grid is None:
        sizes = [1] * len(main)
        if lengths is None or len(lengths) != len(sizes):
            lengths = _lengths(held, known, counts)
    else:
        sizes = [t * h * w for t, h, w in grid.tolist()]
        merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        if merged is None:
            raise Unknown(f"{known.grid} is given, but spatial_merge_size is not known")
        lengths = [size // merged**2 for size in sizes]
    if any(len(tensor) != len(sizes) for name, tensor in held.items() if name != known.main) or len(main) != sum(sizes):
        raise Unknown(f"{sorted(held)} are not for the same number of {modality}s")
    return Media(held, known.main, sizes, owners(modality, counts, lengths))


def placeholders(modality: str, input_ids: Tensor, config: Any) -> list[int]:
    """How many tokens of each row stand for media.

    Raises:
        Unknown: the configuration names no such token, or the prompt is given as embeddings.
    """
    token = getattr(config, f"{modality}_token_id", getattr(config, f"{modality}_token_index", None))
    if token is None or input_ids.numel() == 0:
        raise Unknown(f"there are no {modality} tokens to count")
    return (input_ids == token).sum(1).tolist()


def owners(modality: str, counts: Sequence[int], lengths: Sequence[int]) -> list[range]:
    """For each row the units that take its `counts` placeholders, in order; `lengths` are those of the units.

    Raises:
        Unknown: no cut between units falls on a cut between rows.
    """
    found, unit = [], 0
    for count in counts:
        first = unit
        while count > 0 and unit < len(lengths):
            count -= lengths[unit]
            unit += 1
        if count:
            break
        found.append(range(first, unit))
    if len(found) < len(counts) or unit < len(lengths):
        raise Unknown(f"{modality} tokens of the rows do not fit the {modality}s")
    return found


def repeats_whole(known: Modality, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether inputs with a grid were repeated unit by unit or row by row, so that each unit's patches stayed together."""
    assert known.grid is not None
    first = int(before[known.grid][0].prod())
    return torch.equal(before[known.main][:first], after[known.main][:first])


def _lengths(held: dict[str, Tensor], known: Modality, counts: list[int]) -> list[int]:
    """Tokens of each unit where no grid tells: one unit a row, or as many for each of equal units."""
    units = len(held[known.main])
    if units == len(counts) and all(counts):
        return counts
    beside = [tensor for name, tensor in held.items() if name != known.main]
    if any(len(tensor) != units or bool((tensor != tensor[:1]).any()) for tensor in beside):
        raise Unknown(f"how many tokens one of {known.main} takes is not known")
    if sum(counts) % units:
        raise Unknown(f"{sum(counts)} tokens stand for {units} of {known.main}")
    return [sum(counts) // units] * units


def _kinds(tensor: Tensor, sizes: list[int]) -> list[int]:
    """Numbers of the parts of `tensor`, of `sizes` rows each: equal where the bits are."""
    rows = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
    bits = rows.contiguous().view(_BITS[tensor.element_size()])
    sums, starts = bits.sum(1, dtype=torch.int64).tolist(), [0, *accumulate(sizes)]
    candidates: dict[tuple[int, ...], list[int]] = {}
    for unit, (begin, end) in enumerate(pairwise(starts)):
        candidates.setdefault(tuple(sums[begin:end]), []).append(unit)
    kinds, parts, groups = list(range(len(sizes))), bits.split(sizes), list(candidates.values())
    while groups := [group for group in groups if len(group) > 1]:
        pairs = [(group[0], unit) for group in groups for unit in group[1:]]
        same = iter(torch.stack([(parts[first] == parts[unit]).all() for first, unit in pairs]).tolist())
        others = []
        for group in groups:
            equal = {unit for unit in group[1:] if next(same)}
            for unit in equal:
                kinds[unit] = group[0]
            others.append([unit for unit in group[1:] if unit not in equal])
        groups = others
    return kinds


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of a tensor, in this order."""
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))
