"""`Ranks`: the processes that compute one model together: what they agree on, and the end of a call when one fails."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fastattn.parallel import later_sums
from hf_fastattn.parallel import watch as watching
from hf_fastattn.parallel.all_reduce import all_gather
from hf_fastattn.parallel.later_sums import MOST_ROWS, ROWS_STEP, CopiedSums
from hf_fastattn.parallel.peer_memory import PeerMemory, is_right, places_of, why_not_peers
from hf_fastattn.parallel.shared_heads import SharedHeads
from hf_fastattn.parallel.understood import group_of, sums_of, why_not_understood
from hf_fastattn.parallel.watch import RankFailedError, Watch, how_ended, wait_for

logger = logging.getLogger("hf_fastattn")

# Processes make the models that they compute together in one order, so numbers name the same model on each.
_numbers = itertools.count()
# Names of what ranks say of themselves in the store.
PATCHED, UNPATCHED = "patched ", "unpatched"


class Ranks:
    """The ranks of one model.

    Args:
        group: the process group.
        device: of this rank's shards.
        heads: that several ranks share, if there are any.
        why_not_understood: why the model had to run as Transformers would run it when it was patched, if it had to.
    """

    def __init__(
        self, group: Any, device: torch.device, heads: SharedHeads | None = None, why_not_understood: str | None = None
    ) -> None:
        self._group, self._device, self.heads = group, device, heads
        self.why_not_understood = why_not_understood
        self.count: int = group.size()
        self._rank: int = dist.get_rank(group)
        self._store = dist.PrefixStore(f"hf_fastattn/{next(_numbers)}", dist.distributed_c10d._get_default_store())
        self._calls = 0
        # Of the last call, if it failed here: what the ranks said, and how many forwards had begun.
        self._failed: tuple[Any, int] | None = None
        self._all_patched = False
        self._watch: Watch | None = None
        # Why there can be no more calls.
        self.failure: str | None = None
        # In which sums of few rows are made, and why there is none.
        self.peers: PeerMemory | None = None
        self.why_no_peers: str | None = None
        self._asked = False
        # The autocast dtype in which recorded forwards were compared with the model as it is.
        self.checked_in: list[Any] = []
        # What was decided of the model's modules as they were looked at.
        self.kept: tuple[Any, tuple[str | None, ...]] | None = None
        self._later: CopiedSums | None = None
        self._may_copy = True

    def say_patched(self, patched: bool) -> None:
        """Tell the other ranks that the model is patched here, or is not any more."""
        try:
            self._store.set(f"{PATCHED}{self._rank}" if patched else UNPATCHED, str(self._rank))
        except Exception as error:
            # At the end of a program the process that holds the store may have gone.
            logger.info("hf_fastattn could not tell the other ranks that it was patched or unpatched: %s", error)

    def watched(self, call: Callable[[], Any]) -> Any:
        """What the call returns.

        Raises:
            RankFailedError: another rank failed, in this call or before.
            ValueError: another rank has unpatched the model.
        """
        if self._watch is not None:
            # A call inside of another one.
            return call()
        self._calls += 1
        store = dist.PrefixStore(str(self._calls), self._store)
        watch = self._watch = Watch(store, self._rank, self.count, self._group.abort, self._why_gone)
        try:
            with watch:
                self._see_all_well(watch)
                self.refresh_heads()
                result = call()
                if self.peers is not None and bool(self.peers.late):
                    raise RankFailedError("a rank did not come to a sum: what was generated is worth nothing")
                return result
        except BaseException:
            self._failed = store, watch.begun
            raise
        finally:
            self.failure, self._watch = self.failure or watch.failure, None

    def _see_all_well(self, watch: Watch) -> None:
        """That this call's sums will meet those of all other ranks."""
        if self.failure is None and self._failed is not None:
            self.failure = self._why_no_more(*self._failed)
        if self.failure is not None:
            raise RankFailedError(f"{self.failure}; start all processes anew")
        self._failed = None
        if not self._all_patched:
            names = [f"{PATCHED}{rank}" for rank in range(self.count)]
            if not wait_for(self._store, names, watching.LATE, watch.check):
                raise RankFailedError(f"the model was not patched on every rank for {watching.LATE:.0f} s")
            self._all_patched = True
        gone = self._why_gone()
        if gone is not None:
            raise ValueError(gone)

    def _why_gone(self) -> str | None:
        """That a rank has unpatched the model."""
        if not self._store.check([UNPATCHED]):
            return None
        other = self._store.get(UNPATCHED).decode()
        return f"rank {other} has unpatched the model; call patch() or unpatch() on every rank, in one order"

    def _why_no_more(self, store: Any, begun: int) -> str | None:
        """Why no call can follow one that has failed here; None if it ended on every rank where it did here, or went on."""
        for other in range(self.count):
            if other == self._rank:
                continue
            try:
                ended, error = how_ended(store, other)
            except Exception as failure:
                return str(failure)
            if ended is not None and (ended != begun or error.startswith(RankFailedError.__name__)):
                return f"the call before failed here, and on rank {other} at another step with {error}"
        return None

    def compare_results(self, result: int) -> None:
        """See that every rank has generated the same, at the end of a call whose loop is Transformers' own.

        Raises:
            RankFailedError: another rank failed meanwhile.
            ValueError: they have generated different things.
        """
        if self._watch is not None:
            self._watch.compare(result)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward inside sums over ranks; nobody waits for one that does not come."""
        watch = self._watch
        if watch is None:
            yield
            return
        watch.begin_forward()
        event = None
        try:
            yield
            if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
        finally:
            watch.end_forward(event)

    def count_step(self) -> None:
        """A step of the device's loop begins."""
        if self._watch is not None:
            self._watch.begun += 1

    def refresh_heads(self) -> None:
        """Gather the heads that ranks share from the weights as they are, before these are read; by all ranks."""
        if self.heads is not None:
            self.heads.refresh()

    def waits(self, receive: Callable[[], Any]) -> Any:
        """What `receive`, which waits for a step, gives.

        Raises:
            RankFailedError: another rank failed meanwhile; what came is worth nothing.
        """
        watch = self._watch
        if watch is None:
            return receive()
        watch.begin_to_wait()
        try:
            return receive()
        finally:
            watch.end_waiting()

    def set_up_peers(self, model: Any) -> None:
        """Have sums of few rows made in memory that all ranks read, if they can; once, by all ranks at the same time."""
        if self._asked:
            return
        self._asked = True
        places = self.gathered(places_of(self._device))
        reason = why_not_peers(places, self._device)
        if reason is None and (sums_of(model) % 2 or model.dtype not in (torch.bfloat16, torch.float16, torch.float32)):
            # Slots take turns, also from the last sum of a forward to the first one of the next.
            reason = "an odd number of sums"
        memory = None
        if self.everywhere(reason is None):
            try:
                hidden = model.config.get_text_config(decoder=True).hidden_size
                memory = PeerMemory(self._group, self._device, hidden, model.dtype, self.everywhere)
                reason = None if is_right(memory, self._group) else "its sums are wrong"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        if self.everywhere(reason is None and memory is not None):
            self.peers = memory
        else:
            self.why_no_peers = reason or "it failed on another rank"
            logger.info("hf_fastattn sums over ranks by the process group alone: %s", self.why_no_peers)

    def later_sums(self, rows: int, hidden: int, dtype: torch.dtype) -> CopiedSums | None:
        """What makes sums of so many rows beside products; None if nothing does. All ranks ask at the same time."""
        if self.peers is None or self.count != 2 or rows > MOST_ROWS or not self._may_copy:
            return None
        if self._later is None or not self._later.takes(rows, hidden, dtype):
            self._later, sums = None, None
            try:
                room = -(-rows // ROWS_STEP) * ROWS_STEP
                sums = CopiedSums(self._group, self._device, room, hidden, dtype, self.everywhere)
                sums = sums if later_sums.is_right(sums, self._group) else None
            except Exception as error:
                logger.info("hf_fastattn sums prompts by the process group: %s: %s", type(error).__name__, error)
            self._may_copy = self.everywhere(sums is not None)
            self._later = sums if self._may_copy else None
        return self._later

    def gathered(self, values: Sequence[int]) -> list[list[int]]:
        """The values of every rank, as many of each; waits for them."""
        return self.waits(lambda: self._gathered(values))

    def _gathered(self, values: Sequence[int]) -> list[list[int]]:
        with torch.inference_mode(False), torch.no_grad():
            mine = torch.tensor(values, dtype=torch.int64).to(self._device)
            found = mine.new_empty(self.count, len(values))
            all_gather(found.view(-1), mine, self._group)
            return found.tolist()

    def alike(self, values: Sequence[int]) -> bool:
        """Whether every rank has these values; waits for them."""
        return all(others == list(values) for others in self.gathered(values))

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on every rank; waits for them."""
        return all(value for (value,) in self.gathered([int(holds)]))

    def take_first(self, tensor: Tensor) -> None:
        """Write what rank 0 has in `tensor` to that of every rank."""
        dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self._group)


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that Transformers has spread a model over; None if it is whole, or spread in a way of which nothing is
    known."""
    group = group_of(model) if is_spread(model) else None
    if group is None or group.size() == 1:
        return None
    reason = why_not_understood(model)
    return Ranks(group, model.device, SharedHeads.of(model) if reason is None else None, reason)


def is_spread(model: Any) -> bool:
    """Whether Transformers has spread the model's layers over processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1
