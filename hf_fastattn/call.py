"""`Call`: one `generate()` under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_fastattn.cache.lent_cache import LentCache
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.expansion import Expansion
from hf_fastattn.pages.spans import Token
from hf_fastattn.transformers_version import CACHE


@dataclass(eq=False)
class Call:
    """One `generate()` under way, the caches made for it, and what is going on in it."""

    caches: list[PagedCache] = field(default_factory=list)
    lent: list[LentCache] = field(default_factory=list)
    expansion: Expansion | None = None
    prefilled: Any = None
    # For how many of its last columns the forward under way computes logits; generate() reads them, padding or not.
    logits_read: int = 1
    # Tokens of the prompt, padding included; 0 if it is given as embeddings.
    prompt_columns: int = 0
    # Why all its forwards attend as Transformers does, although their cache has pages.
    why_dense: str | None = None
    # Whether torch.compile made parts of the model, which run as they were written; None until somebody looked.
    compiled: bool | None = None
    # Code of the user's may run between two forwards, and change the model: modules are looked at before each of them.
    users_code: bool = True
    # The layers of a hybrid are walked through, as was seen at its prompt.
    walks: bool = False
    encoded_from: dict[str, Any] = field(default_factory=dict)
    # What the prompt's rows consist of, where their pages are to stay after the call.
    prompt: Any = None
    # A look at the model's modules, until code of the user's may run again.
    seen: Any = None
    # Forwards compute the prompt.
    prefilling: bool = False
    # From how many tokens on a prompt is computed in two halves, on every rank that computes the model; 0: never.
    halves_from: int = 0
    # Which row of the prompt under way each row of the batch goes on from; None where each has its own.
    copies: list[int] | None = None
    # Of a model over several ranks: the prompt, and what the call says of itself, by which the ranks know it.
    input_ids: Any = None
    synced: bool = False
    # Why every rank runs Transformers' path; and what a loop may do that all of them run.
    why_apart: str | None = None
    is_private: bool = True
    keeps_rows: bool = True
    # What is to be done when it has ended.
    at_end: list[Callable[[], None]] = field(default_factory=list)
    # What a rehearsal of the prompt rehearses besides: how tokens are chosen behind it.
    rehearses_too: Callable[[], None] | None = None
    # The device's loop is under way, and its static tensors are in use.
    looping: bool = False
    # It has chosen the tokens.
    looped: bool = False
    token: Callable[[], Token | None] = lambda: None

    def begin(self) -> Token:
        """The call is under way while the token exists, which no variable should hold; see `Turn`."""
        box = [Token()]
        try:
            self.token = weakref.ref(box[0])
            return box.pop()
        except BaseException:
            box.clear()
            raise

    def release(self, result: Any) -> list[PagedCache]:
        """Release the caches but the one that `result` returns to the caller; give back those that users lent.

        Again after an exception, it goes on where that came.
        """
        while self.at_end:
            self.at_end[-1]()
            self.at_end.pop()
        for lent in self.lent:
            lent.give_back()
            if getattr(result, CACHE, None) is lent.paged:
                result[CACHE] = lent.dynamic
        kept = getattr(result, CACHE, None)
        for cache in self.caches:
            if cache is not kept:
                cache.reset()
        return [cache for cache in self.caches if cache is kept]
