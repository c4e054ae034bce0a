"""Long prompts in pieces, so that the memory of a forward's activations is bounded.

Sarathi's chunked prefill (Agrawal et al., 2023) for the sake of memory: every piece appends to the pages and reads what
the pieces before it have written, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.stream_layout import StreamLayout

# Tokens of all rows in one piece at most, and those that run whole. Pages for the whole call are there before the prompt, so
# its activations have to take less than those of Transformers, which computes it at once. A piece should keep a large GPU
# busy for longer than its launches take; sizes are by arithmetic, for half a billion parameters, and not measured.
PIECE_TOKENS, WHOLE_TOKENS = 8192, 12_288
# Both on a CPU, where pages take no memory before they are written, and pieces after the first need a mask.
CPU_TOKENS = 32_768
# Of 8-bit keys each piece widens all that its rows have so far (`kernels/attention/widened_pages.py`): half as many pieces
# halve that, and the memory that the pages save is far more than twice the activations take.
EIGHT_BIT_PIECES = 2
BY_COLUMN = ("input_ids", "inputs_embeds", "position_ids")


def pieces(arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]] | None:
    """The arguments of a decoder's forward, cut into pieces of columns; None if it runs whole.

    Args:
        arguments: of the forward: tokens `[B, S]` or `[B, S, hidden]`, positions `[..., S]`, mask `[B, past + S]`.
        kwargs: what else it is given.
    """
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    rows, columns = tokens.shape[:2]
    most, whole = (CPU_TOKENS, CPU_TOKENS) if tokens.device.type == "cpu" else (PIECE_TOKENS, WHOLE_TOKENS)
    if cache.stores_eight_bits:
        most *= EIGHT_BIT_PIECES
    if rows * columns <= whole or columns == 1 or torch.is_grad_enabled():
        return None
    if any(value is not None for name, value in arguments.items() if name not in (*BY_COLUMN, "attention_mask")):
        return None
    if any(value not in (None, False) for name, value in kwargs.items() if name not in ("use_cache", "return_dict")):
        return None
    if kwargs.get("return_dict") is False:
        return None
    past = cache.get_seq_length()
    if past and any(window is not None for window in cache.tables):
        # What a window has left behind could not be put back if a later piece fails.
        return None
    mask = arguments["attention_mask"]
    if mask is not None and not _is_padded_on_the_left(mask, past + columns):
        return None
    return _cut(arguments, past, columns, max(most // rows, 1))


def streamed_pieces(arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]] | None:
    """The same for rows that forget tokens: a piece ends where a row is full, which then lets tokens go.

    Raises:
        ValueError: the forward has to be cut, and is given what cannot be.
    """
    layout = cache.stream
    assert layout is not None
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    (rows, columns), past = tokens.shape[:2], cache.get_seq_length()
    mask, lengths = arguments["attention_mask"], cache.lengths or [0] * rows
    if columns == 1 or max(lengths) + columns <= layout.capacity or len(lengths) != rows:
        return None
    new = np.ones((rows, columns), np.int64)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= past + columns:
        new = mask[:, past : past + columns].to("cpu", torch.bool).numpy().astype(np.int64)
    most = CPU_TOKENS if tokens.device.type == "cpu" else PIECE_TOKENS
    ends = _ends(new, np.array(lengths), layout, max(most // rows, 1))
    if len(ends) == 1:
        return None
    given = [name for name, value in arguments.items() if value is not None and name not in (*BY_COLUMN, "attention_mask")]
    known = ("use_cache", "return_dict")
    given += [name for name, value in kwargs.items() if value not in (None, False) and name not in known]
    if given or kwargs.get("return_dict") is False:
        raise ValueError(
            f"a forward of {columns} columns is computed in pieces with {cache.groups.streaming}, which takes no "
            f"{', '.join(given) or 'return_dict=False'}; give fewer columns at a time"
        )
    return _pieces_to(arguments, past, ends)


def _ends(new: NDArray[np.int64], lengths: NDArray[np.int64], layout: StreamLayout, most: int) -> list[int]:
    """Columns before which pieces end: none has a row get more tokens than there is room for once it has made room.

    Args:
        new: `[B, S]`, 1 where a column holds a token of the row.
        lengths: `[B]` tokens that rows hold.
        most: columns of a piece.
    """
    ends, first, columns = list[int](), 0, new.shape[1]
    while first < columns:
        piece = new[:, first : first + most].cumsum(1)
        held = np.where(lengths >= layout.capacity, lengths - layout.step, lengths)
        # Rows that get no token stay full.
        fits = ((held[:, None] + piece <= layout.capacity) | (piece == 0)).all(0)
        count = int(fits.argmin()) if not fits.all() else piece.shape[1]
        added = piece[:, count - 1]
        lengths, first = np.where(added > 0, held + added, lengths), first + count
        ends.append(first)
    return ends


def run_pieces(
    cut: Iterator[dict[str, Any]], columns: int, cache: PagedCache, forward: Callable[[dict[str, Any]], Any]
) -> Any:
    """Run `forward` on every piece; the output of the last one, with the hidden states of all `columns`.

    Raises:
        Exception: what a piece raised; the cache is as before the first one, or empty if its rows have let tokens go.
    """
    past, hidden, outputs = cache.get_seq_length(), None, None
    try:
        for piece in cut:
            outputs, first = forward(piece), cache.get_seq_length() - past
            states = outputs.last_hidden_state
            if hidden is None:
                # Made once: the pieces and what they are joined to would be there at the same time.
                hidden = states.new_empty(states.shape[0], columns, *states.shape[2:])
            hidden[:, first - states.shape[1] : first] = states
            del states
            outputs.last_hidden_state = hidden
    except BaseException:
        done = cache.get_seq_length() - past
        if not past or cache.stream is not None:
            # What rows have let go cannot be brought back.
            cache.reset()
        elif done:
            cache.crop(-done)
        raise
    assert outputs is not None
    return outputs


def _cut(arguments: dict[str, Any], past: int, columns: int, step: int) -> Iterator[dict[str, Any]]:
    # Pieces of equal length but for rounding: a short one at the end would waste a pass over the weights.
    count = max(-(-columns // step), 2)
    yield from _pieces_to(arguments, past, [columns * place // count for place in range(1, count + 1)])


def _pieces_to(arguments: dict[str, Any], past: int, ends: list[int]) -> Iterator[dict[str, Any]]:
    for first, last in zip([0, *ends], ends, strict=False):
        piece = dict(arguments)
        for name in BY_COLUMN:
            value = arguments[name]
            if value is not None:
                axis = 1 if name != "position_ids" else value.ndim - 1
                piece[name] = value.narrow(axis, first, last - first)
        if arguments["attention_mask"] is not None:
            piece["attention_mask"] = arguments["attention_mask"][:, : past + last]
        yield piece


def _is_padded_on_the_left(mask: Any, columns: int) -> bool:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != columns:
        return False
    shown = mask.to("cpu", torch.bool)
    return bool((shown[:, 1:] >= shown[:, :-1]).all()) and bool(shown[:, -1].all())
