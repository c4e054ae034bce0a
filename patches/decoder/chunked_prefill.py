"""Long prompts in pieces, so that the memory of a forward's activations is bounded.

Sarathi's chunked prefill (Agrawal et al., 2023) for the sake of memory: every piece appends to the pages and reads what
the pieces before it have written, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache

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


def run_pieces(
    cut: Iterator[dict[str, Any]], columns: int, cache: PagedCache, forward: Callable[[dict[str, Any]], Any]
) -> Any:
    """Run `forward` on every piece; the output of the last one, with the hidden states of all `columns`.

    Raises:
        Exception: what a piece raised; the cache is as before the first one.
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
        if not past:
            cache.reset()
        elif done:
            cache.crop(-done)
        raise
    assert outputs is not None
    return outputs


def _cut(arguments: dict[str, Any], past: int, columns: int, step: int) -> Iterator[dict[str, Any]]:
    # Pieces of equal length but for rounding: a short one at the end would waste a pass over the weights.
    count = max(-(-columns // step), 2)
    ends = [columns * place // count for place in range(count + 1)]
    for first, last in zip(ends, ends[1:], strict=False):
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
