"""`BeamLoop`: a `DecodeLoop` whose step searches with beams: rows go on as others, and all of them end at once.

Each row owns pages for all its tokens, as ever. Which of them its page table names is decided on the device
(`kernels/sampling/fork.py`): tables are uploaded once, and later only what each row owns. So the host counts and releases
pages as if rows never changed places, and nothing that the device does can lose one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_groups import PrefixGroups
from hf_fastattn.counters import CallCounters
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.kernels.sampling.fork import fork
from hf_fastattn.kernels.sampling.loop_tensors import LoopTensors
from hf_fastattn.loop.beam_request import BeamRequest, without_ends
from hf_fastattn.loop.beam_state import BeamShape, BeamState
from hf_fastattn.loop.beam_step import candidates, search_step
from hf_fastattn.loop.decode_loop import DecodeLoop
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.loop.page_places import PagePlaces
from hf_fastattn.loop.row_adapters import RowAdapters


class BeamLoop(DecodeLoop):
    """One call's beam search, from the logits of the prompt to the sequences.

    Args:
        search: what the call asks for.
        vocabulary: size of the logits.

    The others are those of `DecodeLoop`; `input_ids [N * M, S]` has the M beams of a prompt side by side.
    """

    _moves = True

    def __init__(
        self,
        model: Any,
        graphs: LoopGraphs,
        counters: CallCounters,
        search: BeamRequest,
        cache: PagedCache,
        input_ids: Tensor,
        positions: Tensor,
        *,
        vocabulary: int,
        forward: Callable[..., Any],
        logits_of: Callable[[Any, Tensor], Tensor],
        adapters: RowAdapters | None = None,
    ) -> None:
        self._search, self._prompt = search, input_ids.shape[1]
        self._shape = BeamShape.of(search, *input_ids.shape)
        self._has_tables = False
        super().__init__(
            model, graphs, counters, without_ends(search.loop), cache, input_ids, positions, vocabulary=vocabulary,
            private=True, forward=forward, logits_of=logits_of, adapters=adapters,
        )  # fmt: skip
        self._beams.begin(search, input_ids)
        self._places = PagePlaces(cache, self._beams.places)

    def sequences(self, logits: Tensor) -> Tensor:
        """Search.

        Args:
            logits: `[N * M, V]` after the prompt.

        Returns:
            `[N * returned, S + new]` int64, what Transformers' `_beam_search` returns.

        Raises:
            CacheFullError: no pages are left.
        """
        self.run(logits)
        return self._beams.result(self._search, self._prompt)

    @property
    def _beams(self) -> BeamState:
        return self._state.beams(self._shape, 2 * len(self._cache.paged_layers))

    def _key_for(self, rows: int, shared: PrefixGroups | None = None) -> GraphKey:
        return super()._key_for(rows, shared).of_beams(self._beams)

    def _finish_step(self, key: GraphKey, logits: Tensor) -> Tensor:
        """Continue all beams by `logits [rows, V]`, and prepare the next step."""
        state, beams, rows = self._state, self._beams, self._shape.rows
        tensors: LoopTensors = state.tensors(max(key.rows, self._used), key.penalised)
        if key.history:
            state.processors.follow(beams.running_sequences.flatten(0, 1))
        best = candidates(state, key, beams, logits[:rows])
        tokens = search_step(beams, best, tensors.step, self._search.length_penalty)
        tensors.chosen[:rows].copy_(tokens)
        if tensors.seen is not None:
            tensors.seen[:rows].copy_(tensors.seen[:rows].index_select(0, beams.parents))
        page_size = self._cache.groups.page_size
        if self._states is not None:
            self._states.follow(beams.parents)
        fork(state.fork_tensors(beams, self._places.pages, page_size))
        advance(tensors, page_size)
        return beams.packed

    def _write_tables(self) -> None:
        tables = [table.as_array()[0] for table in self._cache.tables.values()]
        if not self._has_tables:
            self._state.write_tables(tables)
            self._has_tables = True
        self._state.write_tables(tables, own=True)
        self._places.write()
