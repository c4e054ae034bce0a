"""`Ranks`: the processes that compute one model together: what they agree on, and the end of a call when one fails."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fastattn.parallel import later_sums
from hf_fastattn.parallel.all_reduce import all_gather
from hf_fastattn.parallel.later_sums import MOST_ROWS, ROWS_STEP, CopiedSums
from hf_fastattn.parallel.peer_memory import PeerMemory, is_right, places_of, why_not_peers
from hf_fastattn.parallel.shared_heads import SharedHeads
from hf_fastattn.parallel.understood import group_of, sums_of, why_not_understood
from hf_fastattn.parallel.watch import RankFailedError, Watch

logger = logging.getLogger("hf_fastattn")

# Processes make the models that they compute together in one order, so numbers name the same model on each.
_numbers = itertools.count()


class Ranks:
    """The ranks of one model.

    Args:
        group: the process group.
        device: of this rank's shards.
        heads: that several ranks share, if there are any.
    """

    def __init__(self, group: Any, device: torch.device, heads: SharedHeads | None = None) -> None:
        self._group, self._device, self.heads = group, device, heads
        self.count: int = group.size()
        self._store = dist.PrefixStore(f"hf_fastattn/{next(_numbers)}", dist.distributed_c10d._get_default_store())
        self._calls = 0
        self._watch: Watch | None = None
        # Why there can be no more calls.
        self.failure: str | None = None
        # In which sums of few rows are made, and why there is none.
        self.peers: PeerMemory | None = None
        self.why_no_peers: str | None = None
        self._asked = False
        self._later: CopiedSums | None = None
        self._may_copy = True

    def watched(self, call: Callable[[], Any]) -> Any:
        """What the call returns.

        Raises:
            RankFailedError: another rank failed, in this call or before.
        """
        if self.failure is not None:
            raise RankFailedError(f"{self.failure}; start all processes anew")
        if self._watch is not None:
            # A call inside of another one.
            return call()
        self._calls += 1
        store = dist.PrefixStore(str(self._calls), self._store)
        watch = self._watch = Watch(store, dist.get_rank(self._group), self.count, self._group.abort)
        try:
            with watch:
                self.refresh_heads()
                result = call()
                if self.peers is not None and bool(self.peers.late):
                    raise RankFailedError("a rank did not come to a sum: what was generated is worth nothing")
                return result
        finally:
            self.failure, self._watch = watch.failure, None

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
                memory = PeerMemory(self._group, self._device, hidden, model.dtype)
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
                sums = CopiedSums(self._group, self._device, -(-rows // ROWS_STEP) * ROWS_STEP, hidden, dtype)
                sums = sums if later_sums.is_right(sums, self._group) else None
            except Exception as error:
                logger.info("hf_fastattn sums prompts by the process group: %s: %s", type(error).__name__, error)
            self._may_copy = self.everywhere(sums is not None)
            self._later = sums if self._may_copy else None
        return self._later

    def gathered(self, values: Sequence[int]) -> list[list[int]]:
        """The values of every rank, as many of each; waits for them."""
        with torch.inference_mode(False), torch.no_grad():
            mine = torch.tensor(values, dtype=torch.int64).to(self._device)
            found = mine.new_empty(self.count, len(values))
            all_gather(found.view(-1), mine, self._group)
            return found.tolist()

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on every rank; waits for them."""
        return all(value for (value,) in self.gathered([int(holds)]))

    def take_first(self, tensor: Tensor) -> None:
        """Write what rank 0 has in `tensor` to that of every rank."""
        dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self._group)


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that Transformers has spread a model over; None if it is whole, or spread in a way not understood."""
    if not is_spread(model) or why_not_understood(model) is not None:
        return None
    group = group_of(model)
    return None if group is None or group.size() == 1 else Ranks(group, model.device, SharedHeads.of(model))


def is_spread(model: Any) -> bool:
    """Whether Transformers has spread the model's layers over processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1
