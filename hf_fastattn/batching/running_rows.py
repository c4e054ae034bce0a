"""`RunningRows`: what the host knows of the slots whose requests take part in decode steps, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.batching.row_tokens import UNLIMITED, Array
from hf_fastattn.kernels.sampling.params import SamplingParams


class RunningRows:
    """One entry a slot.

    Args:
        slots: how many there are.

    Attributes:
        alive: the slot takes part in the next step.
        lengths: tokens stored, counting steps that are under way.
        room: tokens that its pages hold.
        left: steps that it may yet take part in.
        most: tokens that it stores at most.
        tickets: `[slots, 2]` place and serial number of its request's tokens; a place of -1 for none.
        numbers: of the requests.
        params: `[slots, PARAMS]` of their draws.
        changed: slots of which the device does not know yet.
        count: slots that take part.
    """

    def __init__(self, slots: int) -> None:
        self.alive: NDArray[np.bool_] = np.zeros(slots, np.bool_)
        self.lengths: Array = np.zeros(slots, np.int64)
        self.room: Array = np.zeros(slots, np.int64)
        self.left: Array = np.zeros(slots, np.int64)
        self.most: Array = np.zeros(slots, np.int64)
        self.numbers: Array = np.zeros(slots, np.int64)
        self.tickets: Array = np.full((slots, 2), -1, np.int64)
        self.params: NDArray[np.float64] = np.tile(np.array(SamplingParams().values()), (slots, 1))
        self.changed: set[int] = set()
        self.count = 0
        # Steps, the next one included, for which no row can be short of pages; and steps until the first one ends.
        self._enough, self._first_end = 0, UNLIMITED
        self._slots: Array | None = None

    @property
    def slots(self) -> Array:
        """Slots that take part, in ascending order; not to be written to."""
        if self._slots is None:
            self._slots = np.flatnonzero(self.alive)
        return self._slots

    def join(
        self, slot: int, length: int, room: int, left: int, most: int, number: int, ticket: Any, params: SamplingParams
    ) -> None:
        """A slot takes part from the next step on."""
        self.alive[slot], self.lengths[slot], self.room[slot] = True, length, room
        self.count, self._slots, self._first_end = self.count + 1, None, min(self._first_end, left)
        if room < most:
            self._enough = min(self._enough, room - length - 1)
        self.left[slot], self.most[slot], self.numbers[slot], self.tickets[slot] = left, most, number, ticket
        self.params[slot] = params.values()
        self.changed.add(slot)

    def leave(self, slot: int) -> None:
        """A slot takes part no more."""
        if self.alive[slot]:
            self.changed.add(slot)
            self.count, self._slots = self.count - 1, None
        self.alive[slot], self.lengths[slot], self.tickets[slot] = False, 0, -1

    def move(self, source: int, target: int) -> None:
        """A slot that takes no part becomes what another one is."""
        for name in ("alive", "lengths", "room", "left", "most", "numbers", "tickets", "params"):
            held = getattr(self, name)
            held[target] = held[source]
        self.count, self._slots = self.count + int(self.alive[target]), None
        self.changed.add(target)
        self.leave(source)

    def short(self) -> list[int]:
        """Slots whose pages do not reach to the token after the next one, for which a step computes the place."""
        if self._enough > 0:
            return []
        # Of rows that get no more pages there is none to wait for.
        over = np.where(self.alive & (self.room < self.most), self.room - self.lengths - 2, UNLIMITED)
        found: list[int] = np.flatnonzero(over < 0).tolist()
        self._enough = int(over.min()) + 1
        return found

    def step(self) -> list[int]:
        """A step was launched; returns the slots for which it was the last one."""
        self._enough, self._first_end = self._enough - 1, self._first_end - 1
        self.lengths += self.alive
        self.left -= self.alive
        if self._first_end > 0:
            return []
        left = self.left[self.slots]
        ended: list[int] = self.slots[left <= 0].tolist()
        self._first_end = int(left[left > 0].min(initial=UNLIMITED))
        return ended
