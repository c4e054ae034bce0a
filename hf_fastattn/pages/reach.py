"""How far ahead of its tokens a cache takes pages where pages have to be made.

Pages that move cost a copy of every layer and all captured graphs; pages that are never used cost memory that
Transformers' growing cache would not take. So a call whose rows cannot end before its last step takes all its pages before
the prompt. Where rows may end, there are pages for the first `FIRST` steps, and ordinary calls never move any. Later rows
grow by `AHEAD` tokens or one part in `PARTS` of their length at a time: at most 3% of a long row is idle, and a row that
grows from 1,000 tokens to 32,000 moves about a hundred times, each of them worth tens of steps or hundreds. What rows that
have ended leave behind is used before anything moves.
"""

from __future__ import annotations

# New tokens a row that a call has pages for before its prompt is computed, although its rows may end.
FIRST = 512
# Tokens a row that are added at a time after them, or the row's length divided by `PARTS` if that is more.
AHEAD, PARTS = 64, 32
# Tokens beyond a window that a row may hold: those ahead, and those of steps of which the host does not know yet.
BEHIND = AHEAD + 16


def tokens_ahead(columns: int, room: int, first: int, is_prompt: bool) -> int:
    """Tokens beyond `columns` that rows should get pages for, if pages have to be made.

    Args:
        columns: that the rows will have for sure.
        room: columns that they will have at most; below `columns` if that is not known.
        first: columns that pages are there for from the start.
        is_prompt: nobody knows yet whether more will come.
    """
    reach = max(first, columns + (0 if is_prompt else max(AHEAD, columns // PARTS)))
    return max((min(reach, room) if columns < room else reach) - columns, 0)
