"""`RowTokens`: the new tokens of the requests under way, as arrays, so that a step of many rows costs no loop over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# Stands for no limit, and is no token.
UNLIMITED = 2**31 - 1
NO_TOKEN = -1
# Smallest arrays; they double.
MIN_PLACES, MIN_COLUMNS, MIN_ENDS = 64, 64, 1

Array = NDArray[np.int64]


class RowTokens:
    """Tokens by place; a place belongs to one request from `open` to `close`.

    What a step chose for a request that has ended meanwhile comes with a serial number that its place has no more.

    Args:
        with_logprobs: with each token comes the logarithm of its probability.
    """

    def __init__(self, with_logprobs: bool = False) -> None:
        self._tokens: Array = np.zeros((MIN_PLACES, MIN_COLUMNS), np.int64)
        self._logprobs: NDArray[np.float32] | None = (
            np.zeros((MIN_PLACES, MIN_COLUMNS), np.float32) if with_logprobs else None
        )
        self._ends: Array = np.full((MIN_PLACES, MIN_ENDS), NO_TOKEN, np.int64)
        self._limits: Array = np.zeros(MIN_PLACES, np.int64)
        self._counts: Array = np.zeros(MIN_PLACES, np.int64)
        self.serials: Array = np.full(MIN_PLACES, -1, np.int64)
        self._streams: NDArray[np.bool_] = np.zeros(MIN_PLACES, np.bool_)
        self._free = list(range(MIN_PLACES - 1, -1, -1))
        self._next = 0

    def open(self, limit: int, ends: Iterable[int], streams: bool) -> int:
        """A place for a request that gets `limit` tokens at most, and none after one of `ends`."""
        if not self._free:
            self._more_places()
        place, wanted = self._free.pop(), sorted(ends)
        if len(wanted) > self._ends.shape[1]:
            self._ends = np.pad(self._ends, ((0, 0), (0, len(wanted) - self._ends.shape[1])), constant_values=NO_TOKEN)
        self._ends[place] = NO_TOKEN
        self._ends[place, : len(wanted)] = wanted
        self._limits[place], self._counts[place], self._streams[place] = limit, 0, streams
        self.serials[place] = self._next
        self._next += 1
        return place

    def close(self, place: int) -> None:
        """The place is free."""
        self.serials[place] = -1
        self._free.append(place)

    def of(self, place: int) -> list[int]:
        """The tokens of a place so far."""
        found: list[int] = self._tokens[place, : self._counts[place]].tolist()
        return found

    def last(self, places: Sequence[int]) -> tuple[list[int], list[float] | list[None]]:
        """The last tokens of these places, and the logarithms of their probabilities, None if these do not come."""
        index = np.asarray(places, np.int64)
        columns = self._counts[index] - 1
        tokens: list[int] = self._tokens[index, columns].tolist()
        if self._logprobs is None:
            return tokens, [None] * len(tokens)
        logprobs: list[float] = self._logprobs[index, columns].tolist()
        return tokens, logprobs

    def logprobs_of(self, place: int) -> list[float]:
        """The logarithms of their probabilities, if these come."""
        if self._logprobs is None:
            return []
        found: list[float] = self._logprobs[place, : self._counts[place]].tolist()
        return found

    def take(
        self, tickets: Array, tokens: Array, logprobs: NDArray[np.float32] | None = None
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Add what a step chose.

        Args:
            tickets: `[rows, 2]` place and serial number of each row, a place of -1 for none.
            tokens: `[rows]`.
            logprobs: `[rows]` logarithms of their probabilities, if these come.

        Returns:
            Places that have got a token: their first one; that have ended with it; that are streamed and go on.
        """
        places, serials = tickets[:, 0], tickets[:, 1]
        fresh = (places >= 0) & (self.serials[places] == serials)
        places, tokens = places[fresh], tokens[fresh]
        counts = self._counts[places]
        if len(counts) and counts.max() >= self._tokens.shape[1]:
            more = ((0, 0), (0, self._tokens.shape[1]))
            self._tokens = np.pad(self._tokens, more)
            self._logprobs = None if self._logprobs is None else np.pad(self._logprobs, more)
        self._tokens[places, counts] = tokens
        if self._logprobs is not None and logprobs is not None:
            self._logprobs[places, counts] = logprobs[fresh]
        self._counts[places] = counts + 1
        ended = (counts + 1 >= self._limits[places]) | (tokens[:, None] == self._ends[places]).any(1)
        streamed = self._streams[places] & ~ended
        return places[counts == 0].tolist(), places[ended].tolist(), places[streamed].tolist()

    def _more_places(self) -> None:
        count = len(self.serials)
        for name in ("_tokens", "_logprobs", "_ends", "_limits", "_counts", "_streams", "serials"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, np.concatenate((held, np.zeros_like(held))))
        self.serials[count:] = -1
        self._free.extend(range(2 * count - 1, count - 1, -1))
