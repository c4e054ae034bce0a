"""`RunningBatch`: which request is in which slot with which pages; who comes in, and who has to go when pages run out."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from hf_fastattn.batching.requests import Request
from hf_fastattn.batching.row_tokens import Array, RowTokens
from hf_fastattn.batching.running_rows import RunningRows
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.pages.page_pool import CacheFullError

# Tokens that a running row gets pages for at a time.
AHEAD = 64
# Tokens after its prompt that a request gets pages for at once where their number has no limit.
ROOM = 1024


class RunningBatch:
    """Requests that wait, requests in slots, and requests whose last tokens are under way.

    Args:
        pages: of the slots, all empty.
        slots: how many.
        with_logprobs: with each token comes the logarithm of its probability.
    """

    def __init__(self, pages: SlotPages, slots: int, with_logprobs: bool = False) -> None:
        self.pages, self.counters = pages, pages.counters
        self.tokens, self.rows = RowTokens(with_logprobs), RunningRows(slots)
        # Both in the order of their turns.
        self.waiting: list[Request] = []
        self.prompts: list[Request] = []
        self.by_slot: dict[int, Request] = {}
        self.by_place: dict[int, Request] = {}
        # The lowest slot is the last one, and used first.
        self._free = list(range(slots - 1, -1, -1))

    def all(self) -> list[Request]:
        """The requests that are not over."""
        held = (*self.waiting, *self.by_slot.values(), *self.by_place.values())
        return list({id(one): one for one in held}.values())

    @property
    def is_empty(self) -> bool:
        """There are none."""
        return not (self.waiting or self.by_slot or self.by_place)

    # ---- in ---------------------------------------------------------------------------------------------------

    def wait(self, request: Request) -> None:
        """It waits for its turn."""
        bisect.insort(self.waiting, request, key=lambda one: one.turn)

    def admit(self) -> list[tuple[Request, Exception]]:
        """Give waiting requests slots and the pages of their prompts, first come, first served.

        Returns:
            Requests that can never be served, and why.
        """
        refused: list[tuple[Request, Exception]] = []
        place = 0
        while place < len(self.waiting) and self._free:
            request = self.waiting[place]
            error = self._why_never(request)
            if error is not None:
                refused.append((request, error))
            elif request.after is not None and request.after.is_waited_for:
                place += 1
                continue
            elif not self._take_in(request):
                if self.by_slot:
                    break
                # Nobody here will make place.
                refused.append((request, self._no_pages(request)))
            del self.waiting[place]
        return refused

    def _why_never(self, request: Request) -> Exception | None:
        if not len(request.prompt):
            return ValueError("the request has no prompt: give at least one token")
        size, most = self.pages.page_size, self.pages.most
        needed = -(-(len(request.prompt) + 1) // size)
        if most is None or needed <= most:
            return None
        return CacheFullError(
            f"the request holds {len(request.prompt)} tokens, which need {needed} pages of {size}, and there are {most}: "
            "raise memory_limit, num_blocks or max_memory_percent"
        )

    def _no_pages(self, request: Request) -> Exception:
        held = max(group.pool.in_use for group in self.pages.cache.groups)
        return CacheFullError(
            f"the prompt of {len(request.prompt)} tokens gets no pages: of {self.pages.most}, caches "
            f"outside of the batch hold {held}; delete them, or raise memory_limit, num_blocks or max_memory_percent"
        )

    def _take_in(self, request: Request) -> bool:
        """Whether there are pages for its prompt and its first token, and one more for each row that goes on."""
        size, prompt = self.pages.page_size, len(request.prompt)
        slot, found, held = self._free[-1], *self._found(request)
        if found:
            self.pages.begin(slot, found)
        needed = -(-(prompt + 1) // size) - len(found)
        # One page more for each row that goes on.
        spare, alone = self.rows.count + len(self.prompts), not self.by_slot
        if not self.pages.can_take(needed + (0 if alone else spare), alone):
            self.pages.release([slot])
            return False
        if self.pages.most is None:
            # Side by side, they are read in one piece.
            needed = -(-min(request.most_stored, prompt + ROOM) // size) - len(found)
        self.pages.extend(slot, max(needed, 1))
        self._free.pop()
        request.slot, request.done, request.found = slot, held, found
        self.by_slot[slot] = request
        bisect.insort(self.prompts, request, key=lambda one: one.turn)
        self.counters.tokens_reused += held
        request.admitted()
        return True

    def _found(self, request: Request) -> tuple[list[int], int]:
        """Whole pages that hold the first tokens of its prompt, but for the last one, and how many."""
        store, size = self.pages.store, self.pages.page_size
        if store is None:
            return [], 0
        pages, held = store.index.match(self.pages.root, request.row_tokens(size))
        whole = pages[: held // size]
        store.index.touch([whole])
        return whole, len(whole) * size

    def start(self, request: Request) -> tuple[int, int]:
        """Its prompt is computed, its first token under way; returns the ticket of its tokens."""
        self.prompts.remove(request)
        if self.pages.store is not None:
            tokens = request.row_tokens(self.pages.page_size)
            self.pages.keep_prompt(request.slot, tokens, request.found)
            self.pages.store.index.touch_inserted()
        place = self.tokens.open(request.limit, request.ends, request.is_watched)
        request.place = place
        self.by_place[place] = request
        ticket = place, int(self.tokens.serials[place])
        slot, length = request.slot, len(request.prompt)
        room = self.pages.columns(slot) * self.pages.page_size
        self.rows.join(slot, length, room, request.limit - 1, request.most_stored, request.number, ticket, request.params)
        return ticket

    def advance(self, taken: list[tuple[Request, int]]) -> Array:
        """A step takes in so many tokens of these prompts; returns `[n, 2]` tickets, of no place where a prompt goes on."""
        tickets = np.full((len(taken), 2), -1)
        for place, (request, count) in enumerate(taken):
            request.done += count
            if request.done == len(request.prompt):
                tickets[place] = self.start(request)
                if request.limit <= 1:
                    self.vacate(request)
        self.counters.prompt_tokens += sum(count for _, count in taken)
        self.counters.prompt_pieces_mixed += len(taken)
        return tickets

    # ---- out --------------------------------------------------------------------------------------------------

    def vacate(self, request: Request) -> None:
        """Its slot is free, and its pages: whatever is launched later comes later."""
        slot = request.slot
        if slot < 0:
            return
        if request in self.prompts:
            self.prompts.remove(request)
        self.rows.leave(slot)
        self.pages.release([slot])
        del self.by_slot[slot]
        bisect.insort(self._free, slot, key=lambda free: -free)
        request.leave()

    def chosen(self, request: Request) -> tuple[list[int], list[float]]:
        """The tokens that have arrived of it since it got its slot, and the logarithms of their probabilities."""
        place = request.place
        return ([], []) if place < 0 else (self.tokens.of(place), self.tokens.logprobs_of(place))

    def close(self, request: Request) -> None:
        """Its tokens are not collected any more."""
        place, request.place = request.place, -1
        if place >= 0:
            del self.by_place[place]
            self.tokens.close(place)

    def remove(self, request: Request) -> None:
        """It is in no list, slot or place."""
        if request in self.waiting:
            self.waiting.remove(request)
        self.vacate(request)
        self.close(request)

    def preempt(self, request: Request) -> None:
        """It waits again, the tokens that it has chosen, all of which have arrived, being part of its prompt."""
        self.vacate(request)
        chosen = self.chosen(request)
        self.close(request)
        request.start_over(*chosen)
        self.wait(request)
        self.counters.requests_preempted += 1

    # ---- going on ---------------------------------------------------------------------------------------------

    def extend(self, slot: int) -> bool:
        """Give a slot pages for some tokens more, or for the next one; whether there were any."""
        size, held = self.pages.page_size, int(self.rows.room[slot])
        needed = min(int(self.rows.lengths[slot]) + 2, int(self.rows.most[slot])) - held
        likely = min(held + AHEAD, int(self.rows.most[slot])) - held
        for tokens in (likely, needed):
            pages = -(-tokens // size)
            if self.pages.can_take(pages, len(self.by_slot) == 1):
                self.pages.extend(slot, pages)
                self.rows.room[slot] = held + pages * size
                return True
        return False

    def youngest(self) -> Request:
        """The request in a slot whose turn came last."""
        return max(self.by_slot.values(), key=lambda one: one.turn)

    def compact(self, used: int) -> None:
        """Have the rows that take part in the first `used` slots; nothing may be under way."""
        for slot in sorted((slot for slot in self.by_slot if slot >= used), reverse=True):
            target = self._free.pop()
            if target > slot:
                self._free.append(target)
                return
            request: Any = self.by_slot.pop(slot)
            self.pages.move(slot, target)
            self.rows.move(slot, target)
            request.slot = target
            self.by_slot[target] = request
            bisect.insort(self._free, slot, key=lambda free: -free)
