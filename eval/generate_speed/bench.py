"""`Bench`: one case of the `generate()` benchmark: agreement, then stock, compiled and patched in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.counters import CallCounters
from hf_fastattn.eval.accuracy.agreement import Agreement, Verdict
from hf_fastattn.eval.generate_speed.cases import ENDING, Case
from hf_fastattn.eval.generate_speed.limit import step_limit
from hf_fastattn.eval.generate_speed.systems import System, twin
from hf_fastattn.eval.kernel_speed.ceilings import measure_ceilings

# Tokens after the first of the process's first call.
FIRST_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Args:
        new: tokens after the first that are timed; `stock_new` of systems that are not ours.
        pairs: interleaved rounds, of which medians count; the first call of each system comes before them.
        once: kinds for which stock is measured in the first round only, and without a warm-up.
        compile: also stock with a static cache and `torch.compile`; CUDA only, and not for samples of one prompt.
        check_each: check the agreement of every case, not of the first of each kind.
        patch: options of `hf_fastattn.patch`.
    """

    new: int
    stock_new: int
    pairs: int
    once: tuple[str, ...]
    compile: bool
    check_each: bool
    patch: Mapping[str, Any]


@dataclass
class Bench:
    """Measures cases of one model in one process.

    Args:
        model: stock, in eval mode, on its device.
        settings: how.
        say: takes a line of progress.
        read: bytes a second that the device reads, measured behind the first call; None on a CPU.
    """

    model: Any
    settings: Settings
    say: Callable[[str], None]
    read: float | None = None
    _verdicts: dict[str, tuple[str, Verdict]] = field(default_factory=dict)
    _used: bool = False

    def measure(self, case: Case) -> dict[str, Any]:
        """The record of one case; without ratios if the patched model is wrong or did not run on its own path."""
        process_first = self._first_call(case)
        checked, verdict = self._verdict(case)
        self.say(f"{case.kind} {case.name}: {'agrees' if verdict.agrees else 'RED'}, {verdict.detail}")
        systems = self._systems(case)
        ours = systems[-1]
        over_one = self._rounds(case, systems)
        call = hf_fastattn.report(ours.model).last_call
        assert call is not None
        idle = problems(call, 1 + ours.new, self._has_graphs, drafts=case.kind == "drafts")
        if case.kind in ENDING and not call.fast_loops:
            idle.append("rows did not end early: the loop did not run on the device")
        is_green = verdict.agrees and not idle
        row: dict[str, Any] = {
            **asdict(case),
            "name": case.name,
            "new": ours.new,
            "agrees": verdict.agrees,
            "checked": checked,
            "detail": verdict.detail,
            "problems": idle,
            "counters": {name: dict(count) if isinstance(count, Counter) else count for name, count in vars(call).items()},
            "process_first_call_s": process_first,
            "systems": {system.name: self._figures(case, system) for system in systems},
            "ratios": {other.name: ratios(ours, other) for other in systems[:-1]} if is_green else {},
            "first_over_one_sample": statistics.median(over_one) if over_one and is_green else None,
        }
        self.say("  " + "; ".join(f"{system.name} {_brief(row['systems'][system.name])}" for system in systems))
        return row

    @property
    def _has_graphs(self) -> bool:
        return self.model.device.type == "cuda" and bool(self.settings.patch.get("cuda_graphs"))

    def patched_system(self, name: str = "patched", **options: Any) -> System:
        """A freshly patched twin of the model, without pages or graphs; `options` of `generate()`."""
        return System(name, hf_fastattn.patch(twin(self.model), **self.settings.patch), self.settings.new, options)

    def _first_call(self, case: Case) -> float | None:
        """Seconds of the patched model's first call, before anything else has run in this process; None if it has."""
        if self._used:
            return None
        self._used = True
        seconds = self.patched_system().seconds(case, 0, 1 + min(self.settings.new, FIRST_TOKENS))
        device = self.model.device
        if device.type == "cuda":
            self.read = measure_ceilings(device, self.model.dtype).read
        return seconds

    def _verdict(self, case: Case) -> tuple[str, Verdict]:
        """The name of the case that was checked, this one or the first of its kind, and the verdict."""
        if case.kind not in self._verdicts or self.settings.check_each:
            free_memory()
            ids = case.ids(self.model.config.get_text_config().vocab_size, 0, self.model.device)
            agreement = Agreement(self.model, twin(self.model), self.settings.patch)
            self._verdicts[case.kind] = case.name, agreement(ids, case.arguments)
        return self._verdicts[case.kind]

    def _systems(self, case: Case) -> list[System]:
        """Stock, compiled if asked for, and ours as the last; where rows end early, only ours."""
        settings = self.settings
        if case.kind in ENDING:
            ours = self.patched_system()
            # A cache that is returned keeps all rows. One model for both: the pages of two might not fit.
            stays = System("stays", ours.model, settings.new, {"return_dict_in_generate": True}, borrowed=True)
            return [stays, ours]
        systems = [System("stock", self.model, settings.stock_new)]
        if settings.compile and case.kind != "samples":
            torch.compiler.reset()
            # A twin of its own for each case: its cache is as long as the longest that it ever had.
            systems.append(System("compiled", twin(self.model), settings.stock_new, {"cache_implementation": "static"}))
        return [*systems, self.patched_system()]

    def _rounds(self, case: Case, systems: Sequence[System]) -> list[float]:
        """Fill the timings of all systems; of samples, returns our first token's time over that of a single sample."""
        free_memory()
        once = [system.name for system in systems[:-1] if case.kind in self.settings.once]
        # Ours first, so that nothing is warm yet where a model is borrowed.
        for system in reversed(systems):
            if system.name not in once:
                system.warm_up(case)
        ours, over_one = systems[-1], []
        for number in range(1, self.settings.pairs + 1):
            # Before the others, so that the last call's counters are those of a whole call.
            one = ours.seconds(case, -number, 1, rows=1) if case.kind == "samples" else None
            for system in systems if number % 2 else reversed(systems):
                if system.name not in once:
                    system.measure(case, number)
                elif number == 1:
                    with system.watched():
                        system.measure(case, number)
            if one is not None:
                over_one.append(ours.timings[-1].first / one)
        return over_one

    def _figures(self, case: Case, system: System) -> dict[str, Any]:
        first, token = (statistics.median(getattr(t, name) for t in system.timings) for name in ("first", "token"))
        limit = None if self.read is None else step_limit(self.model, case, system.new, self.read)
        return {
            "first_ms": 1e3 * first,
            "token_ms": 1e3 * token,
            "tokens_per_s": sum(case.steps(system.new)) / system.new / token,
            "call_s": first + system.new * token,
            "new": system.new,
            "peak_gb": None if system.peak is None else system.peak / 1e9,
            "limit_ms": None if limit is None else 1e3 * limit,
            "share_of_limit": None if limit is None else limit / token,
            "first_call_s": system.first_call,
            "timings": [asdict(timing) for timing in system.timings],
        }


def ratios(ours: System, other: System) -> dict[str, float]:
    """Ours over the other's: the median of the pairs, or where the other was measured once the ratio of the medians."""
    found = {}
    for name in ("first", "token"):
        a, b = ([getattr(timing, name) for timing in system.timings] for system in (ours, other))
        paired = len(a) == len(b)
        found[name] = statistics.median(x / y for x, y in zip(a, b, strict=True)) if paired else _quotient(a, b)
    return found


def _quotient(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(a) / statistics.median(b)


def _brief(found: dict[str, Any]) -> str:
    return f"{found['first_ms']:.1f} ms, then {found['token_ms']:.2f} ms a token"


def problems(call: CallCounters, tokens: int, graphs: bool, drafts: bool = False) -> list[str]:
    """Why a call of `tokens` new tokens cannot count as one of the patched model; empty if it can.

    Args:
        graphs: forwards after the prompt were to be replayed.
        drafts: it verified several tokens at a time, so that fewer forwards are enough.
    """
    found = [f"fell back: {reason} ({count} times)" for reason, count in call.fallbacks.items()]
    if max(call.forwards, 1 + call.graphs_replayed) < (2 if drafts else tokens):
        found.append(f"{call.forwards} paged forwards for {tokens} tokens")
    if graphs and not (call.appends_replayed if drafts else call.graphs_replayed):
        found.append(f"no step was replayed from a graph: {dict(call.uncaptured) or 'no reason is known'}")
    return found


def free_memory() -> None:
    """Give back what an earlier case left: memory in pieces costs the next one speed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
