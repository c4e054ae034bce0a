"""`Entry`: one forward of a decoder over static inputs, on one device or several, recorded or about to be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.autocast import autocast_as, region_dtype
from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.crossing import Crossing
from hf_fastattn.cache.forward_states import ForwardStates
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.graphs.staged_forward import StagedForward
from hf_fastattn.graphs.static_inputs import StaticInputs
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.transformers_version import CACHE


@dataclass
class Entry:
    """A captured forward and what it was captured with.

    Attributes:
        groups: whose pages it reads, at `storage_version`.
        outputs: the class of the decoder's output.
        states: of linear-attention layers, if the model has any.
        crossing: to layers on other devices, if there are any; `followers` are the inputs there.
    """

    inputs: StaticInputs
    batch: Batch
    recorded: RecordedForward | StagedForward
    groups: weakref.ref[PageGroups]
    storage_version: int = -1
    outputs: Any = None
    states: ForwardStates | None = None
    crossing: Crossing | None = None
    followers: Sequence[StaticInputs] = ()

    def fits(self, cache: PagedCache, columns: int) -> bool:
        """Whether the graph fits this cache: the same page groups, page tensors not moved, a page table wide enough."""
        version = cache.groups.storage_version
        return self.groups() is cache.groups and self.storage_version == version and self.inputs.columns >= columns

    def write(self, arguments: dict[str, Any], cache: PagedCache, batch: Batch) -> None:
        """Put the values of a forward in place, on each device, without a look at it."""
        self.inputs.write(arguments, cache, batch)
        for inputs in self.followers:
            inputs.follow(self.inputs)

    def launcher(self, decoder: Any, forward: Callable[..., Any], cache: PagedCache) -> Callable[[], Tensor]:
        """The decoder's forward over the static inputs."""

        def run() -> Tensor:
            # What a graph computes must be ordinary tensors, whatever mode the caller is in.
            device = self.inputs.shape.device
            region = autocast_as(device, region_dtype(device))
            try:
                over = cache.using(self.batch, self.states, self.crossing)
                with over, torch.inference_mode(False), torch.no_grad(), region:
                    arguments = {**self.inputs.arguments(), "use_cache": True, "return_dict": True}
                    outputs = forward(decoder, cache, **arguments)
            finally:
                # The next forward over these inputs has other positions and lengths, and a graph records that it makes both.
                for batch in (self.batch,) if self.crossing is None else self.crossing.batches.values():
                    batch.forget_tables()
            self.outputs = type(outputs)
            others = set(outputs) - {"last_hidden_state", CACHE}
            if others:
                raise RuntimeError(f"the decoder also returns {sorted(others)}")
            return outputs.last_hidden_state

        return run
