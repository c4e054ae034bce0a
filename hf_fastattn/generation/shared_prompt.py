"""`SharedPrompt`: a prompt of which only what no page holds is computed: pages of earlier calls, or of rows before.

Rows that begin alike are computed in turns: one of them first, then all others, which append to its pages; of prefixes
within prefixes, a level a turn. A row goes on from the pages that it begins with as a chat does: its cache holds tokens, and
its forward is one of the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_store import PrefixStore
from hf_fastattn.cache.shared_rows import as_computed_alone, begin_on, gather
from hf_fastattn.pages.prefix_index import RowTokens
from hf_fastattn.transformers_version import CACHE

# Columns of all rows in one forward on shared pages, at most; shorter rows are padded to the longest.
MOST_COLUMNS = 8192

Compute = Callable[[Tensor, dict[str, Any]], Any]


@dataclass
class Part:
    """Rows that are computed together: their numbers, how many of their tokens pages hold already, and which whole ones."""

    rows: list[int]
    cache: PagedCache
    held: list[int]
    found: list[list[int]]
    outputs: Any = None


@dataclass
class SharedPrompt:
    """The rows of a prompt, and the pages that they may begin with.

    Args:
        new_cache: makes an empty cache over the same pages.
        cache: that the prompt ends up in.
        store: its index finds pages; `root` is the state of the model.
        rows: their tokens.
        shown: `[B, S]` bool on the host, where these are.
        worth: tokens that a turn of its own has to save.
        paths: the pages of the index that hold each row, once it is computed.
    """

    new_cache: Callable[[], PagedCache]
    cache: PagedCache
    store: PrefixStore
    root: int
    rows: list[RowTokens]
    shown: Tensor
    worth: int
    paths: dict[int, list[int]] = field(default_factory=dict)
    _parts: list[Part] = field(default_factory=list)
    # Columns that rows get pages for ahead of their tokens.
    _ahead: int = 0

    def compute(self, compute: Compute, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """The outputs of the prompt's forward, of which there are logits of the last column; the cache holds the prompt.

        Args:
            compute: the forward of a prompt, or of its rows after the tokens that their cache holds.
        """
        waiting = list(range(len(self.rows)))
        self._ahead = self.cache.ahead_of(self.shown.shape[1])
        while waiting:
            now, waiting = self._turn(waiting)
            if not self._parts and not waiting and not any(held for _, _, held in now):
                # Nothing is shared: as ever.
                outputs = compute(input_ids, model_kwargs)
                self._note(self.cache, range(len(self.rows)), [[]] * len(self.rows))
                return outputs
            is_first, parts = not self._parts, self._begun(now, not self._parts and not waiting)
            self._parts += parts
            if is_first:
                # Not before the pages that rows begin with are held.
                self._make_room(now, waiting)
            for part in parts:
                part.outputs = compute(*self._inputs(part, input_ids, model_kwargs))
                if part.cache.dense is not None:
                    return self._whole(compute, input_ids, model_kwargs)
                self._note(part.cache, part.rows, part.found)
        if self._parts[0].cache is self.cache:
            as_computed_alone(self.cache)
            return self._outputs(self._parts[0].outputs.logits[:, -1:], model_kwargs)
        return self._joined(input_ids, model_kwargs)

    def _turn(self, waiting: list[int]) -> tuple[list[tuple[int, list[int], int]], list[int]]:
        """`(row, pages, tokens in them)` of the rows to compute now, and the rows that wait for the pages of others."""
        index, size = self.store.index, self.cache.groups.page_size
        found: dict[int, tuple[list[int], int]] = {}
        for row in waiting:
            near = None
            if found:
                last = next(reversed(found))
                near = found[last][0][: found[last][1] // size], self.rows[row].common(self.rows[last]) // size
            found[row] = index.match(self.root, self.rows[row], near)
        alike: dict[tuple[int, bytes], list[int]] = {}
        for row, (pages, held) in found.items():
            column, tokens = held // size, self.rows[row]
            if (column + 1) * size < len(tokens):
                alike.setdefault((pages[column - 1] if column else self.root, tokens.keys[column]), []).append(row)
        waits = {row for _, *others in alike.values() for row in others}
        if waits and self._saved([found[row][1] for row in waiting], waiting) < self.worth:
            waits = set()
        now = [(row, *found[row]) for row in waiting if row not in waits]
        index.touch(pages for _, pages, _ in now)
        return now, [row for row in waiting if row in waits]

    def _saved(self, held: list[int], waiting: list[int]) -> int:
        return tokens_in_common([self.rows[row] for row in waiting], self.cache.groups.page_size, held)

    def _make_room(self, now: list[tuple[int, list[int], int]], waiting: list[int]) -> None:
        """Pages for the whole prompt at once, so that they need not move between its parts."""
        size, ahead = self.cache.groups.page_size, self._ahead
        followed: dict[tuple[int, bytes], int] = {}
        needed = 0
        # Of the row before: how many columns are pages that are there, and the numbers of those to come.
        last, first, path = None, 0, list[int]()
        for row, pages, held in [*now, *((row, [], 0) for row in waiting)]:
            tokens, whole = self.rows[row], held // size
            # Rows that go on from the same page, or from none, have the same pages to come as long as they are alike.
            same = max(tokens.common(self.rows[last]) // size - whole, 0) if last is not None and whole == first else 0
            path, first, last = path[:same], whole, row
            before = path[-1] if path else (pages[whole - 1] if whole else self.root)
            for key in tokens.keys[whole + len(path) : len(tokens) // size]:
                if (before, key) not in followed:
                    # No page's number.
                    followed[before, key] = -(10**9) - len(followed)
                    needed += 1
                before = followed[before, key]
                path.append(before)
            needed += -(-(len(tokens) + ahead) // size) - len(tokens) // size
        self.cache.groups.group(None).ensure(needed)

    def _begun(self, now: list[tuple[int, list[int], int]], all_rows: bool) -> list[Part]:
        """The rows to compute now in parts, whose caches hold the pages that they begin with.

        Args:
            all_rows: no rows are computed before or after these.
        """
        parts = []
        divided = _divided(now, [len(self.rows[row]) - held for row, _, held in now])
        # Of one row without padding nothing has to be put together.
        alone = all_rows and len(now) == 1 and len(self.rows[0]) == self.shown.shape[1]
        for chosen in divided:
            cache = self.cache if alone else self.new_cache()
            rows, pages, held = (list(values) for values in zip(*chosen, strict=True))
            if any(held):
                begin_on(cache, pages, held)
                self.cache.counters.tokens_reused += sum(held)
            whole = [own[: count // self.cache.groups.page_size] for own, count in zip(pages, held, strict=True)]
            parts.append(Part(rows, cache, held, whole))
        return parts

    def _inputs(self, part: Part, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Inputs of a part: what its cache holds, then the new tokens of its rows, padded on the left."""
        device, past = input_ids.device, part.cache.get_seq_length()
        counts = [len(self.rows[row]) - held for row, held in zip(part.rows, part.held, strict=True)]
        new = max(counts)
        tokens, positions = np.zeros((2, len(counts), new), np.int64)
        for place, (row, held, count) in enumerate(zip(part.rows, part.held, counts, strict=True)):
            tokens[place, new - count :] = self.rows[row].ids[held:]
            positions[place, new - count :] = np.arange(held, held + count)
        # What stands before the new tokens is skipped, as the cache holds it.
        ids = torch.zeros(len(counts), past + new, dtype=input_ids.dtype, device=device)
        shown = host_masks.beside(host_masks.after_padding(part.held, past), host_masks.after_padding(counts, new))
        # Copies of little, as a device that still computes another part is not waited for then.
        ids[:, past:] = torch.from_numpy(tokens).to(device, non_blocking=True)
        places = torch.from_numpy(positions).to(device, non_blocking=True)
        if device.type == "cpu":
            mask = shown
        else:
            sizes = torch.tensor((part.held, counts), device="cpu").to(device, non_blocking=True)
            mask = torch.cat([_after_padding(own, columns) for own, columns in zip(sizes, (past, new), strict=True)], 1)
        part.cache.known_mask.tell(mask, shown)
        return ids, {**model_kwargs, "attention_mask": mask, "position_ids": places, CACHE: part.cache}

    def _note(self, cache: PagedCache, rows: Sequence[int], found: Sequence[list[int]]) -> None:
        """The whole pages of these rows can be found from now on."""
        table = cache.tables[None].rows if cache.dense is None else []
        for pages, row, count, known in zip(table, rows, cache.lengths, found, strict=False):
            self.paths[row] = self.store.index.insert(self.root, self.rows[row], pages, count, found=known)

    def _joined(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """One cache and one output of all parts."""
        places = {row: (part, place) for part in self._parts for place, row in enumerate(part.rows)}
        order = [places[row] for row in range(len(self.rows))]
        gather(self.cache, [(part.cache, place) for part, place in order], self.shown)
        logits = torch.cat([part.outputs.logits[:, -1:] for part in self._parts])
        rows = [row for part in self._parts for row in part.rows]
        back = torch.tensor([rows.index(row) for row in range(len(rows))], device="cpu")
        # The device is not waited for.
        return self._outputs(logits.index_select(0, back.to(logits.device, non_blocking=True)), model_kwargs)

    def _outputs(self, logits: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """The outputs of the prompt, with the `logits` of its last column."""
        self.cache.known_mask.remember(model_kwargs.get("attention_mask"), self.shown.shape[1])
        return type(self._parts[0].outputs)(logits=logits, **{CACHE: self.cache})

    def _whole(self, compute: Compute, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """The prompt as ever, where a forward went over to Transformers' own cache."""
        for part in self._parts:
            part.cache.reset()
        return compute(input_ids, model_kwargs)


def _after_padding(tokens: Tensor, columns: int) -> Tensor:
    """`host_masks.after_padding` on the device of `tokens [B]`."""
    return torch.arange(columns, device=tokens.device) >= columns - tokens[:, None]


def tokens_in_common(rows: Sequence[RowTokens], page_size: int, held: Sequence[int] | None = None) -> int:
    """How many tokens of the rows, in whole pages, other rows begin with too, and so need not be computed again.

    Args:
        held: of each row the tokens that are not computed in any case.
    """
    saved = 0
    # Rows that begin with the same pages, and how many these are.
    groups = [(list(range(len(rows))), 0)] if len(rows) > 1 else []
    while groups:
        alike, above = groups.pop()
        first = rows[alike[0]]
        pages = min(first.common(rows[row]) for row in alike[1:]) // page_size
        known = max(above, held[alike[0]] // page_size if held else 0)
        if pages > known:
            # A row that ends with these pages computes its last token.
            ending = sum(len(rows[row]) == pages * page_size for row in alike)
            saved += (len(alike) - 1) * (pages - known) - max(ending - 1, 0)
        parts: dict[bytes, list[int]] = {}
        for row in alike:
            if len(rows[row]) >= (pages + 1) * page_size:
                parts.setdefault(rows[row].keys[pages], []).append(row)
        groups += [(part, pages) for part in parts.values() if len(part) > 1]
    return saved * page_size


def _divided(now: Sequence[tuple[int, list[int], int]], new: Sequence[int]) -> list[list[tuple[int, list[int], int]]]:
    """The rows in parts: those without a page together, the others by how many tokens are new, MOST_COLUMNS at a time."""
    parts = [[entry for entry in now if not entry[2]]]
    begun = sorted((count, entry) for count, entry in zip(new, now, strict=True) if entry[2])
    part: list[tuple[int, list[int], int]] = []
    for count, entry in begun:
        if part and (len(part) + 1) * count > MOST_COLUMNS:
            parts.append(part)
            part = []
        part.append(entry)
    return [part for part in [*parts, part] if part]
