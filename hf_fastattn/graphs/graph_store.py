"""`GraphStore`: recorded forwards of one model by key: what they share, which is evicted, why others are not recorded."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from hf_fastattn.autocast import region_dtype
from hf_fastattn.counters import CallCounters
from hf_fastattn.graphs.fingerprint import Fingerprint, fingerprint_of, has_experts, why_not_capturable
from hf_fastattn.graphs.module_checks import draws, submodules
from hf_fastattn.graphs.placement import devices_of
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.graphs.staged_forward import StagedForward
from hf_fastattn.hints import with_hint
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.layer_variants import LayerVariants
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.parallel.ending import dropped_before_end
from hf_fastattn.parallel.ranks import Ranks

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace

logger = logging.getLogger("hf_fastattn")

BY_ROW = "adapters are chosen by row (adapter_names)"

Key = TypeVar("Key", bound=Hashable)
Held = TypeVar("Held")


class GraphStore(Generic[Key, Held]):
    """What `ForwardGraphs` and `LoopGraphs` have in common; lives with the model.

    Args:
        enabled: `FastAttnConfig.cuda_graphs`.
        stocks_draws: random numbers are to be Transformers' own; recording a forward, and padding its rows, takes more.
        why_not_experts: see `why_not_capturable`; with `steps=False` it says it of other forwards than decode steps.
        variants: of the model's attention.
    """

    # Tests replace it by a type that runs the forward again, on the CPU.
    forward_type: ClassVar[type[RecordedForward]] = RecordedForward
    staged_type: ClassVar[type[StagedForward] | type[RecordedForward]] = StagedForward

    def __init__(
        self,
        enabled: bool,
        stocks_draws: bool = False,
        why_not_experts: Callable[..., str | None] | None = None,
        variants: LayerVariants | None = None,
    ) -> None:
        self._enabled, self._stocks_draws = enabled, stocks_draws
        self._why_not_experts = why_not_experts
        self._variants = LayerVariants() if variants is None else variants
        # The least recently used first.
        self._entries: OrderedDict[Key, Held] = OrderedDict()
        self._pool: Any = None
        # One for all graphs of the store: no two of them run at the same time.
        self.workspace: Workspace | None = None
        # Of layers on other devices than the first one.
        self._workspaces: dict[torch.device, Workspace] = {}
        self._fingerprint: Fingerprint | None = None
        # One that was just taken, and of what.
        self._known: tuple[tuple[Any, ...], Fingerprint] | None = None
        self._reason: str | None = None
        # Decode steps can be recorded, other forwards cannot.
        self._steps_alone = False
        # Layers are on other devices than the first one.
        self.is_spread = False
        self._logged: set[str] = set()
        # Of a model that is spread over processes: all of them record the same forwards.
        self.ranks: Ranks | None = None
        self._captured = self._dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def recorded(self) -> tuple[Key, ...]:
        """What is held, the least recently used first."""
        return tuple(self._entries)

    def records_on(self, device: torch.device) -> bool:
        """Whether forwards there may be recorded at all."""
        return self._enabled and device.type in self.forward_type.devices

    def drop(self) -> None:
        """Forget all graphs; their memory is free."""
        self._dropped += 1
        self._entries.clear()
        self._pool = self.workspace = None
        self._workspaces = {}

    @property
    def history(self) -> tuple[int, ...]:
        """How often a forward was recorded, and all were dropped; other numbers on another rank mean other graphs there."""
        return self._captured, self._dropped

    def forget(self) -> None:
        """`drop`, and begin to count anew."""
        self.drop()
        self._captured = self._dropped = 0

    def agreed(self, failure: Exception | None, warmed_up: bool) -> Exception | None:
        """Why a capture counts as failed: because it has, or on another rank; None if it worked on all.

        Args:
            warmed_up: the forward has run once, so that no other rank waits for this one in it.

        Raises:
            Exception: `failure`, where other ranks do.
        """
        if self.ranks is None:
            return failure
        if failure is not None and not warmed_up:
            raise failure
        worked = self.ranks.everywhere(failure is None)
        return None if worked else failure or RuntimeError("it failed on another rank")

    @property
    def nbytes(self) -> int:
        """Bytes that all graphs compute in."""
        return 0 if self._pool is None else self._pool.nbytes

    def keep(self, key: Key, held: Held, most: int, alike: Callable[[Key], bool] = lambda key: True) -> None:
        """Hold a recorded forward; of more than `most` with keys `alike`, the least recently used one is evicted."""
        self._entries[key] = held
        self._captured += 1
        if self.ranks is not None:
            dropped_before_end(self)
        others = [other for other in self._entries if alike(other)]
        if len(others) > most:
            del self._entries[others[0]]

    def new_forward(self, device: torch.device) -> RecordedForward:
        """A forward to record, in the capture pool that all of the model's share."""
        if self._pool is None:
            self._pool = self.forward_type.make_pool(device)
        return self.forward_type(self._pool)

    def new_staged_forward(self, devices: Sequence[torch.device]) -> Any:
        """The same of a forward that passes through several devices, the first one first."""
        kind: Any = self.staged_type
        if self._pool is None:
            self._pool = kind.make_pool(devices)
        return kind(self._pool)

    def workspace_on(self, place: torch.device) -> Workspace:
        """The workspace of the layers on one of the devices that forwards pass through."""
        held = self._workspaces.get(place, self.workspace)
        assert held is not None
        return held

    def send(self, states: Sequence[Tensor], place: torch.device) -> list[Tensor]:
        """Hidden states of a forward on another device, on which it goes on."""
        recording = getattr(self._pool, "recording", None)
        if recording is None:
            return [tensor.to(place, non_blocking=True) for tensor in states]
        sent: list[Tensor] = recording.cut(states, place)
        return sent

    def wait(self) -> None:
        """Make the current stream wait for what graphs still do on another one."""
        if self._pool is not None:
            kind: Any = self.staged_type if self.is_spread else self.forward_type
            kind.enter(self._pool)

    def why_not_backend(self, groups: PageGroups, device: torch.device, dtype: torch.dtype) -> str | None:
        """The backend of forwards over these pages, as a reason; None if its launches can be recorded."""
        backend, _ = choose_backend(groups.backend, device, dtype, groups.head_dim, groups.batch_invariant)
        return None if backend in self.forward_type.backends else f"backend {backend}"

    @contextmanager
    def knowing(self, decoder: Any, device: torch.device, fingerprint: Fingerprint) -> Iterator[None]:
        """The fingerprint of a decoder was taken just now, and no user's code runs meanwhile: it is not taken again."""
        self._known = _taken_of(decoder, device), fingerprint
        try:
            yield
        finally:
            self._known = None

    def compare(self, decoder: Any, device: torch.device) -> bool:
        """Whether all that graphs depend on, beside their inputs, is as it was; `_reason` says why none can be recorded."""
        known, before = self._known, self._fingerprint
        now = known[1] if known is not None and known[0] == _taken_of(decoder, device) else fingerprint_of(decoder, device)
        if self._variants:
            now = now._replace(parts=(*now.parts, *self._variants.fingerprint()))
        if now != before:
            self._fingerprint = now
            self._reason = why_not_capturable(decoder, device, self._why_not_experts, not self._variants.all_inside)
            self.is_spread = len(devices_of(decoder, device)) > 1
            if self._reason is None and (self._stocks_draws or self.is_spread) and any(map(draws, submodules(decoder))):
                self._reason = (
                    "dropout draws on several devices" if self.is_spread
                    else "dropout draws as Transformers does: sampling='transformers'"
                )  # fmt: skip
            asked = self._why_not_experts if self._reason is None and has_experts(decoder) else None
            self._steps_alone = asked is not None and asked(decoder, steps=False) is not None
        return before is not None and now.parts == before.parts

    @property
    def reason(self) -> str | None:
        """Why no forward can be recorded, when `compare` was last asked."""
        return self._reason

    def check(self, decoder: Any, device: torch.device) -> bool:
        """`compare` before ranks compare what they have recorded, which goes where something has changed.

        Returns:
            Whether everything is as it was, hooks too, for which nothing goes.
        """
        if not self.records_on(device):
            return True
        before = self._fingerprint
        if not self.compare(decoder, device):
            self.drop()
        return self._fingerprint is before

    @property
    def adapter_names(self) -> tuple[str, ...] | None:
        """The adapter of each row, when `compare` was last asked; None if PEFT chose none by row."""
        return None if self._fingerprint is None else self._fingerprint.adapter_names

    def count_reason(self, reason: str, counters: CallCounters) -> None:
        """Count, and log once, why decode steps are launched one by one."""
        counters.uncaptured[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("hf_fastattn launches decode steps layer by layer: %s", with_hint(reason))


def _taken_of(decoder: Any, device: torch.device) -> tuple[Any, ...]:
    return id(decoder), device, region_dtype(device)
