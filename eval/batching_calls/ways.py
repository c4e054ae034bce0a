"""The ways to serve requests that are all there at once, and their times in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import ContinuousBatchingConfig

import hf_fastattn
from hf_fastattn.eval.batching_calls.cases import Ask
from hf_fastattn.eval.batching_calls.figures import problems, spread
from hf_fastattn.eval.batching_calls.padded import Padded
from hf_fastattn.eval.batching_calls.served import Served, serve, watched
from hf_fastattn.eval.batching_calls.steady import steady
from hf_fastattn.eval.generate_speed.bench import free_memory
from hf_fastattn.eval.generate_speed.systems import twin

# What attentions are tried on: so many requests, of so many tokens.
TRIED, TRIED_NEW = 4, 4
# On a CPU stock takes more than half of the memory, and seconds for it: with this share its calls are quicker.
SHARE_ON_CPU = 0.1


@dataclass
class Way:
    """One way, and what was measured of it.

    Args:
        name: one of `choices.SERVED`.
        run: serves requests, and returns their seconds.
        rounds: in which it takes part.
        said: with what, for the report.
    """

    name: str
    run: Callable[[Sequence[Ask]], float]
    rounds: int
    said: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    serving: list[float] = field(default_factory=list)
    served: Served | None = None
    wrong: list[str] = field(default_factory=list)

    def figures(self, model: Any, tokens: int, read: float | None) -> dict[str, Any]:
        """Medians."""
        median = statistics.median(self.seconds)
        found: dict[str, Any] = {"seconds": median, "rounds": self.seconds, "tokens_s": tokens / median}
        found |= {"said": self.said, "serving": None, "gap_ms": None, "steady": None}
        if self.served is not None and not self.served.remaining:
            found["serving"] = statistics.median(self.serving[-len(self.seconds) :])
            state = steady(model, self.served, read)
            found["gap_ms"] = spread(self.served.gaps)
            found["steady"] = None if state is None else {**vars(state), "share": state.share}
        return found


@dataclass
class Ways:
    """Makes the ways to serve one case.

    Args:
        model: stock.
        patched: the same weights, patched.
        rows: of padded calls, to be tried.
        options: of the command.
    """

    model: Any
    patched: Any
    rows: Sequence[int]
    options: Any

    def make(self, asks: Sequence[Ask]) -> list[Way]:
        """Those that were asked for, warmed up with `asks`; ours is the last."""
        on_gpu = self.model.device.type == "cuda"
        ragged = len({ask.new for ask in asks}) > 1
        found = []
        if "stock_batch" in self.options.system:
            found.append(self._stock_batch(asks))
        if "stock_padded" in self.options.system:
            how = {"most_new": self.options.stock_new, "batches": self.options.stock_batches}
            found.append(self._padded("stock_padded", self.model, asks, self.stock_rounds, **how))
        if "patched_padded" in self.options.system:
            found.append(self._padded("patched_padded", self.patched, asks, self.options.pairs, ends=on_gpu and ragged))
        if "rows_kept" in self.options.system and on_gpu and ragged:
            # A cache that is returned keeps all rows.
            kept = {"return_dict_in_generate": True}
            found.append(self._padded("rows_kept", self.patched, asks, self.options.pairs, options=kept))
        ours = Way("ours", lambda given: self._serve(ours, self.patched, given), self.options.pairs)
        ours.run(asks)
        return [*found, ours]

    @property
    def stock_rounds(self) -> int:
        """In which stock's take part."""
        rounds: int = self.options.stock_rounds or (1 if self.model.device.type == "cuda" else self.options.pairs)
        return rounds

    # ---- running batches --------------------------------------------------------------------------------------

    def stock_manager(self, asks: Sequence[Ask]) -> tuple[Any, str]:
        """Stock, with the quickest attention that its running batches have here, and the name of that."""
        if self.options.attention is not None:
            return _with_attention(self.model, self.options.attention), self.options.attention
        few = [Ask(ask.prompt, min(ask.new, TRIED_NEW)) for ask in asks[:TRIED]]
        times = {}
        for name in _attentions():
            tried = _with_attention(self.model, name)
            # The first time is that of what is made once.
            times[name] = min(serve(tried, few, set(), batching=self.batching(tried)).seconds for _ in range(2))
            free_memory()
        best = min(times, key=lambda name: times[name])
        return _with_attention(self.model, best), best

    def batching(self, model: Any) -> Any:
        """Options of a manager, if they are not the default ones."""
        is_stock = model is not self.patched
        on_cpu = self.model.device.type == "cpu"
        return ContinuousBatchingConfig(max_memory_percent=SHARE_ON_CPU) if is_stock and on_cpu else None

    def _stock_batch(self, asks: Sequence[Ask]) -> Way:
        model, name = self.stock_manager(asks)
        most = self.options.stock_seconds
        made = Way("stock_batch", lambda given: self._serve(made, model, given, most), self.stock_rounds, [name])
        if made.rounds > 1:
            made.run(asks)
        return made

    def _serve(self, way: Way, model: Any, asks: Sequence[Ask], most_seconds: float | None = None) -> float:
        way.served = None
        free_memory()
        way.served = serve(model, asks, watched(asks), most_seconds, self.batching(model))
        way.serving.append(way.served.serving)
        if model is self.patched:
            way.wrong = problems(model, len(asks))
        if way.served.remaining and not any("at least" in word for word in way.said):
            way.said.append(f"at least: {way.served.tokens} tokens in {way.served.seconds:.0f} s")
        return way.served.whole_seconds

    # ---- padded calls -----------------------------------------------------------------------------------------

    def _padded(self, name: str, model: Any, asks: Sequence[Ask], rounds: int, **how: Any) -> Way:
        sizes = sorted({min(size, len(asks)) for size in self.rows})
        made = Way(name, lambda given: 0.0, rounds)
        if rounds == 1 and model is self.model:
            # Measured once: the round itself tries them.
            def run(given: Sequence[Ask]) -> float:
                times = {size: Padded(size, **how).seconds(model, given) for size in sizes}
                return self._chosen(made, times, asks, how)
        else:
            times = {size: Padded(size, **how).seconds(model, asks) for size in sizes}
            if len(sizes) > 1:
                # Nobody is the first again.
                times = {size: Padded(size, **how).seconds(model, asks) for size in sizes}
            self._chosen(made, times, asks, how)
            best = min(times, key=lambda size: times[size])

            def run(given: Sequence[Ask]) -> float:
                return Padded(best, **how).seconds(model, given)

        made.run = run
        return made

    def _chosen(self, way: Way, times: dict[int, float], asks: Sequence[Ask], how: dict[str, Any]) -> float:
        best = min(times, key=lambda size: times[size])
        way.said[:] = [f"{best} rows"]
        if Padded(best, **how).is_scaled(asks):
            way.said.append("scaled")
        return times[best]


def _with_attention(model: Any, name: str) -> Any:
    other = twin(model)
    other.set_attn_implementation(name)
    return other


def _attentions() -> list[str]:
    """What Transformers' running batches can use here: where FlashAttention is installed they take it by themselves."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    for version, is_there in ((3, is_flash_attn_3_available), (2, is_flash_attn_2_available)):
        if is_there():
            return [f"flash_attention_{version}"]
    return ["sdpa", "eager"]


def patched_twin(model: Any, options: Mapping[str, Any]) -> Any:
    """The same weights, patched with these options."""
    return hf_fastattn.patch(twin(model), **options)
