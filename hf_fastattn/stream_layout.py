"""`Streaming`: which tokens a row keeps for generation without end; `StreamLayout`: the same in pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Streaming:
    """A row keeps its first tokens and its last ones, and forgets what lies between (Xiao et al., 2023, "StreamingLLM").

    Keys lie in the cache unrotated, and have the positions of their places in the cache: the sinks come first, then the last
    tokens follow as if nothing had been between. So no position is ever greater than the cache is long.

    Sizes are rounded up to whole pages. A full row lets the oldest `block` of its last tokens go before the next token, so a
    query sees the sinks and at least the last `window` tokens, itself included, and less than `block` and two pages more.
    Which tokens a query sees depends on its place in the row alone, not on how a prompt was cut.

    Args:
        sinks: first tokens of a row that stay.
        window: last tokens that a query sees at least, itself included.
        block: tokens that leave at a time; a quarter of the window by default. Prompts that are longer than the cache are
            computed in pieces of as many tokens.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of its range.
    """

    sinks: int = 4
    window: int = 1024
    block: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("block", 1)):
            value = getattr(self, name)
            if name == "block" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Streaming({name}={value!r}) must be a number of tokens (int)")
            if value < least:
                raise ValueError(f"Streaming({name}={value}) must be at least {least}")

    def layout(self, page_size: int) -> StreamLayout:
        """The same in pages of `page_size` tokens."""
        block = max(self.window // 4, 1) if self.block is None else self.block
        sinks, window, leaving = (-(-count // page_size) for count in (self.sinks, self.window - 1, block))
        return StreamLayout(page_size, sinks, sinks + window + leaving, leaving)


@dataclass(frozen=True)
class StreamLayout:
    """The pages of a row: `sinks` of them stay; when it has `pages` full ones, `leaving` of the others make place.

    Attributes:
        page_size: tokens a page.
        sinks: pages of the first tokens.
        pages: most pages of a row.
        leaving: pages that are used anew at a time.
    """

    page_size: int
    sinks: int
    pages: int
    leaving: int

    @property
    def capacity(self) -> int:
        """Most tokens of a row, and one more than the greatest position."""
        return self.pages * self.page_size

    @property
    def step(self) -> int:
        """Tokens that leave at a time."""
        return self.leaving * self.page_size

    def kept(self, token: int) -> tuple[int, int]:
        """Of the tokens before the `token`-th of a row and itself, `[0, sinks)` and `[first, token]` are seen: both ends.

        As long as all are seen, `first` is the first one behind the sinks.
        """
        gone = -(-max(token + 1 - self.capacity, 0) // self.step) * self.step
        sinks = min(self.sinks * self.page_size, token + 1)
        return sinks, sinks + gone
