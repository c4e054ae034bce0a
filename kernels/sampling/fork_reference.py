"""`fork.fork` in plain PyTorch."""

from __future__ import annotations

from hf_fastattn.kernels.sampling.fork import ForkTensors


def fork(state: ForkTensors) -> None:
    """Let rows go on as their parents, as `fork.fork` does, on any device."""
    rows, columns = state.parents.shape[0], state.tables.shape[2]
    lengths, home, again = state.seq_lens[:rows].tolist(), state.parents.tolist(), [False] * rows
    for first in range(0, rows, state.beams):
        group = range(first, first + state.beams)
        left = [row for row in group if row not in home[first : first + state.beams]]
        seen: set[int] = set()
        for row in group:
            parent = home[row]
            again[row] = parent in seen
            seen.add(parent)
        for row in group:
            home[row] = left.pop(0) if again[row] else home[row]
    for window, table in enumerate(state.tables):
        before = table.clone()
        for row, parent in enumerate(state.parents.tolist()):
            column, partial = lengths[row] // state.page_size, lengths[row] % state.page_size != 0
            table[row, :column] = before[parent, :column]
            if column == columns:
                continue
            page = before[home[row], column] if partial else state.own[window, row, column]
            table[row, column] = page
            copies = again[row] and partial and bool(state.live)
            state.moves[window, row, 0] = before[parent, column] if copies else -1
            state.moves[window, row, 1] = page
    for window, pages in state.pages():
        for source, target in state.moves[window].tolist():
            if source >= 0:
                pages[target] = pages[source].clone()
