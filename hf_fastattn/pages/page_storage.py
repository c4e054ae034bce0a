"""`PageStorage`: the tensors behind the pages of one group, one pair a layer, on that layer's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.kernels.page_formats import is_eight_bits, page_bytes, page_views, raw_pages
from hf_fastattn.transformers_version import CACHE

# Copies of pages in one statement that are listed one by one for each layer.
FEW_COPIES = 8
# Bytes that the kernel reads at a time, and a head dimension that every backend takes.
WORD, HEAD_DIM = 8, 64


class NarrowerKeysError(ValueError):
    """Pages hold keys of a dtype that the one now written includes."""


def copied_with(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The tensors to copy pages in, by their first index: K and V; or with 8 bits the bytes of both and their scales."""
    return (raw_pages(pair[0]),) if is_eight_bits(pair[0]) else pair


class PageStorage:
    """K and V pages `[N, P, G, D]` of each layer, made when the layer first writes.

    Args:
        page_size: tokens a page (P).
        backend: `FastAttnConfig.backend`.
        eight_bits: their dtype, if it is not that of the keys: see `kernels.page_formats`.

    Attributes:
        version: another number whenever tensors were made, moved or dropped.
        capacity: pages that every layer which has been written to holds.
    """

    def __init__(self, page_size: int, eight_bits: torch.dtype | None = None, backend: str = "auto") -> None:
        self.page_size, self.eight_bits, self._backend = page_size, eight_bits, backend
        self.version = 0
        self.capacity = 0
        self._pages: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: torch.dtype | None = None
        # Where tensors of this version lie, by device, as `kernels.sampling.fork.copy_pages` reads it, if it can.
        self._places: tuple[int, dict[torch.device, Tensor] | None] | None = None

    def layer(
        self, layer_idx: int, states: Tensor, capacity: int, may_replace: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor]:
        """The K and V pages of a layer, grown to `capacity` pages.

        Args:
            layer_idx: the layer.
            states: `[..., G, D]` keys about to be written: their heads, dtype and device are what pages must have.
            capacity: pages needed.
            may_replace: asked where pages have another shape: whether nothing stored is still needed, so that they may go.

        Raises:
            NarrowerKeysError: the pages hold tokens of a narrower dtype.
            ValueError: they hold tokens of other heads, dtype or device.
        """
        held = self._pages.get(layer_idx)
        if not is_eight_bits(states):
            self._written = states.dtype
        if held is not None:
            pages = held[0]
            same = pages.shape[2:] == states.shape[-2:] and pages.dtype == (self.eight_bits or states.dtype)
            if same and pages.device == states.device:
                if pages.shape[0] >= capacity:
                    return held
            elif may_replace():
                held = None
            elif self._is_narrower(pages, states):
                raise NarrowerKeysError(f"{CACHE} holds keys in {pages.dtype}, and the model writes {states.dtype}")
            else:
                raise ValueError(
                    f"{CACHE} holds keys of {tuple(pages.shape[2:])} (heads, head dim), {pages.dtype}, "
                    f"{pages.device} in layer {layer_idx}, but the model writes {tuple(states.shape[-2:])}, "
                    f"{states.dtype}, {states.device}; use a cache made for this model, dtype and device, "
                    "or call reset() on it first"
                )
        self.version += 1
        self._pages[layer_idx] = self._made(held, capacity, states)
        self.capacity = min(pages.shape[0] for pages, _ in self._pages.values())
        return self._pages[layer_idx]

    def _made(self, held: tuple[Tensor, Tensor] | None, capacity: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Pages for keys `like: [..., G, D]`, with what `held` has."""
        sizes = self.page_size, like.shape[-2], like.shape[-1]
        old = (None, None) if held is None else copied_with(held)
        if self.eight_bits is None:
            keys, values = (self._grown(pages, (capacity, *sizes), like) for pages in old)
            return keys, values
        raw = torch.empty(0, dtype=torch.uint8, device=like.device)
        return page_views(self._grown(old[0], (capacity, page_bytes(*sizes)), raw), *sizes, self.eight_bits)

    @staticmethod
    def _is_narrower(pages: Tensor, states: Tensor) -> bool:
        if pages.shape[2:] != states.shape[-2:] or pages.device != states.device:
            return False
        return torch.promote_types(pages.dtype, states.dtype) == states.dtype

    def grow(self, capacity: int) -> None:
        """Grow every layer that has been written to `capacity` pages."""
        # Layer by layer: the tensors of one are freed before those of the next are made, so nobody may hold them here.
        for layer_idx in list(self._pages):
            self.layer(layer_idx, self._pages[layer_idx][0], capacity)
        # An exception may have come between the allocation and this note of it.
        self.capacity = min((pages.shape[0] for pages, _ in self._pages.values()), default=0)

    @staticmethod
    def _grown(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        # A tensor made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            pages = torch.empty(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            with torch.no_grad():
                pages[: old.shape[0]].copy_(old)
        return pages

    def copy(self, moves: list[tuple[int, int]], capacity: int) -> None:
        """Copy pages `(source, target)` in every layer, grown to `capacity` pages."""
        if not moves:
            return
        # All layers first, since one that grows moves.
        pairs = [self.layer(layer_idx, self._pages[layer_idx][0], capacity) for layer_idx in list(self._pages)]
        held = [pages for pair in pairs for pages in copied_with(pair)]
        places = self._places_of(held)
        if places is not None:
            # Not before: it imports Triton.
            from hf_fastattn.kernels.sampling.fork import copy_pages

            listed = torch.tensor([moves], dtype=torch.int32, device="cpu")
            for device, own in places.items():
                # From pageable memory this returns once the data is staged, without waiting for the device.
                copy_pages(listed.to(device, non_blocking=True), own)
            return
        if len(moves) <= FEW_COPIES:
            self._copy_few(moves, held)
            return
        host = torch.tensor(moves, device="cpu").T.contiguous()
        on_devices: dict[torch.device, Tensor] = {}
        for pages in held:
            if pages.device not in on_devices:
                on_devices[pages.device] = host.to(pages.device, non_blocking=True)
            source, target = on_devices[pages.device]
            with torch.no_grad():
                pages.index_copy_(0, target, pages.index_select(0, source))

    def _places_of(self, tensors: list[Tensor]) -> dict[torch.device, Tensor] | None:
        """Where all tensors of pages lie, by device, for the kernel that copies; None if it cannot."""
        if self._places is None or self._places[0] != self.version:
            places: dict[torch.device, list[tuple[int, int, int]]] = {}
            for pages in tensors:
                places.setdefault(pages.device, []).append((pages.data_ptr(), pages[0].nbytes // WORD, 0))
            whole = all(pages[0].nbytes % WORD == 0 for pages in tensors)
            usable = whole and all(self._has_kernels(device) for device in places)
            with torch.inference_mode(False):
                # Without waiting for the device: pages may have moved since the last copy, and steps are under way.
                sent = {device: torch.tensor(own).to(device, non_blocking=True) for device, own in places.items() if usable}
            self._places = self.version, sent if usable else None
        return self._places[1]

    def _has_kernels(self, device: torch.device) -> bool:
        # Heads do not matter, whose bytes are copied.
        kernels = device.type == "cuda" and choose_backend(self._backend, device, torch.float16, HEAD_DIM)[0]
        return kernels not in (False, "reference")

    @staticmethod
    def _copy_few(moves: list[tuple[int, int]], held: list[Tensor]) -> None:
        """The same, in few launches: PyTorch copies tensors that are listed together."""
        for device in dict.fromkeys(pages.device for pages in held):
            here = [pages for pages in held if pages.device == device]
            with torch.no_grad():
                targets = [pages[target] for pages in here for _, target in moves]
                torch._foreach_copy_(targets, [pages[source] for pages in here for source, _ in moves])

    def fill_from(self, other: PageStorage, places: Mapping[int, int], capacity: int) -> None:
        """Copy page `page` of `other` to page `places[page]`, in every layer, grown to `capacity` pages."""
        for layer_idx, (held, values) in list(other._pages.items()):
            written = [page for page in places if page < held.shape[0]]
            source = torch.tensor(written, dtype=torch.long).to(held.device)
            target = torch.tensor([places[page] for page in written], dtype=torch.long).to(held.device)
            own = copied_with(self.layer(layer_idx, held, capacity))
            for pages, theirs in zip(own, copied_with((held, values)), strict=True):
                with torch.no_grad():
                    pages.index_copy_(0, target, theirs.index_select(0, source))

    def pages(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """The K and V pages of a layer, or None if it has not written yet."""
        return self._pages.get(layer_idx)

    def any_pages(self) -> Tensor | None:
        """The K pages of some layer, or None if none has written yet."""
        return next(iter(self._pages.values()))[0] if self._pages else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the keys that were written last, or None if no layer has written yet."""
        return self._written if self._pages else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(pages.nbytes for pair in self._pages.values() for pages in copied_with(pair))

    @property
    def saved(self) -> int:
        """Bytes that the same keys and values would take besides, in the dtype that the model gives them."""
        if self.eight_bits is None or self._written is None:
            return 0
        return sum(2 * keys.numel() * self._written.itemsize for keys, _ in self._pages.values()) - self.nbytes

    def forget(self, layer_idx: int) -> None:
        """Drop the tensors of a layer that nobody will read any more."""
        if self._pages.pop(layer_idx, None) is not None:
            self.version += 1
            self.capacity = min((pages.shape[0] for pages, _ in self._pages.values()), default=0)

    def shrink(self, capacity: int) -> None:
        """Make every layer's tensors `capacity` pages long, if they are longer; what they hold is lost."""
        if not capacity:
            self.clear()
        for layer_idx in list(self._pages):
            held = self._pages[layer_idx][0]
            if held.shape[0] > capacity:
                like = torch.empty(0, *held.shape[2:], dtype=held.dtype, device=held.device)
                # Dropped first: the smaller ones fit into its memory.
                del held, self._pages[layer_idx]
                self._pages[layer_idx] = self._made(None, capacity, like)
                self.version += 1
        self.capacity = min((pages.shape[0] for pages, _ in self._pages.values()), default=0)

    def clear(self) -> None:
        """Drop all tensors."""
        self.version += 1
        self.capacity = 0
        self._pages.clear()
