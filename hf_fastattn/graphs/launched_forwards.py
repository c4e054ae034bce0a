"""`LaunchedForwards`: what forwards over several devices, launched one by one, leave for a capture in one pass."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.forward_entry import Entry
from hf_fastattn.graphs.static_inputs import ForwardShape
from hf_fastattn.kernels.launch import power_of_2

Key = tuple[ForwardShape, int, int]

# Whose static inputs are kept.
MOST_KEPT = 2
# Numbers of tokens that are multiples of it are alike to kernels.
EVEN = 64


class LaunchedForwards:
    """Which forwards can be recorded while they run: their kernels are compiled, their workspaces have their size."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._sizes: set[Key] = set()
        self._can_record = True

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Key, entry: Entry) -> None:
        """A forward was launched over the static inputs of `entry`."""
        self._sizes.add(_about(key))
        self._entries[key] = entry
        if len(self._entries) > MOST_KEPT:
            self._entries.popitem(last=False)

    def take(self, key: Key, cache: PagedCache, columns: int) -> Entry | None:
        """The static inputs of the same forward, if they have room for so many pages a row, to be recorded."""
        entry = self._entries.pop(key, None)
        if entry is None or not self._can_record or entry.groups() is not cache.groups or entry.inputs.columns < columns:
            return None
        return entry

    def is_known(self, key: Key) -> bool:
        """Whether a forward of about this size was launched, so that this one's first can be recorded."""
        return self._can_record and _about(key) in self._sizes

    def failed(self) -> None:
        """One could not be recorded while it ran: no more are, until `drop(True)`."""
        self._can_record = False

    def drop(self, changed: bool = False) -> None:
        """Workspaces are gone, or the model has `changed`."""
        self._entries.clear()
        self._sizes.clear()
        self._can_record |= changed


def _about(key: Key) -> Key:
    """What forwards have in common that launch the same kernels: about as many tokens, in buckets of one alignment."""
    shape, layers, groups = key
    assert shape.bucket is not None
    bucket = power_of_2(shape.bucket) if shape.bucket % EVEN == 0 else -shape.bucket
    return replace(shape, bucket=bucket), layers, groups
