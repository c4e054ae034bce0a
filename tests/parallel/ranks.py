"""What runs in each of the processes that share a tiny model: generate() with the loop that is a GPU's otherwise."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor
from transformers.distributed import DistributedConfig

import hf_fastattn
from hf_fastattn.generation import agreed_request
from hf_fastattn.parallel import all_reduce, shared_heads
from hf_fastattn.parallel.later_sums import CopiedSums, LaterSum
from hf_fastattn.parallel.shards import local_of, shards_of
from hf_fastattn.parallel.understood import why_not_understood
from hf_fastattn.patches.fused import halves, products
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.reexecuted import ReexecutedLoopStep, reexecuted_loop

_models: dict[Any, Any] = {}


def load(path: str, by_expert: bool = False, **options: Any) -> Any:
    """The model in `path`, with this rank's shards of the weights; `by_expert`: some experts, whole, and all else."""
    key = (path, by_expert, tuple(options.items()))
    if key not in _models:
        if by_expert:
            count = torch.distributed.get_world_size()
            config = DistributedConfig(tp_size=count, ep_size=count)
            options = {"tp_plan": None, "distributed_config": config}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _models[key] = AutoModelForCausalLM.from_pretrained(path, **{"tp_plan": "auto", **options}).eval()
    return _models[key]


def generate(path: str, calls: list[dict[str, Any]], fused: bool, **loading: Any) -> list[tuple[Any, Any]]:
    """Tokens and counters of each call, of a model patched for it all."""
    model = load(path, **loading)
    found = []
    with reexecuted_loop(), fused_in_torch() if fused else contextlib.nullcontext():
        hf_fastattn.patch(model, cuda_graphs=True)
        try:
            for call in calls:
                torch.manual_seed(call.pop("seed", 0))
                with torch.no_grad():
                    tokens = model.generate(**call)
                report = hf_fastattn.report(model)
                assert report.pages_in_use == 0
                found.append((tokens, report.last_call))
        finally:
            hf_fastattn.unpatch(model)
    return found


def rank() -> int:
    return torch.distributed.get_rank()


def one(model: Any, call: dict[str, Any]) -> tuple[Any, Any]:
    """Tokens and counters of a call of a patched model."""
    options = dict(call)
    torch.manual_seed(options.pop("seed", 0))
    with torch.no_grad():
        tokens = model.generate(**options)
    return tokens, hf_fastattn.report(model).last_call


def traced(path: str, call: dict[str, Any]) -> tuple[int, int, set[Any], set[Any]]:
    """Sums and gathers of a call; where the weights of products lay, and where this rank's shards do."""
    model, seen = load(path), set()
    counts = {"all_reduce": 0, "gather_columns": 0}
    held = {shard.weight.data_ptr() for shard in shards_of(model)}
    with (
        reexecuted_loop(),
        fused_in_torch(),
        hf_fastattn.patched(model, cuda_graphs=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        for place, name in ((products, "all_reduce"), (products, "gather_columns"), (all_reduce, "all_reduce")):
            patch.setattr(place, name, _counting(getattr(place, name), name, counts))
        matvec = products.matvec

        def seeing(x: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
            seen.update(weight.data_ptr() for weight in weights)
            return matvec(x, weights, *args, **kwargs)

        patch.setattr(products, "matvec", seeing)
        one(model, call)
    return counts["all_reduce"], counts["gather_columns"], seen, held


def _counting(function: Any, name: str, counts: dict[str, int]) -> Any:
    def counted(*args: Any) -> Any:
        counts[name] += 1
        return function(*args)

    return counted


class Slots:
    """Stands for peer memory: sums are gloo's, and a slot must be free again before it is written."""

    flags = launches = inboxes = pushed = late = None
    rank = 0

    def __init__(self, group: Any, hidden: int, pushes: bool) -> None:
        self.group, self.slots, self.sums = group, [torch.full((64, hidden), float("nan")) for _ in range(2)], 0
        self.are_pushed, self.ways = pushes, set[str]()

    def takes(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        return rows <= 64

    def pushes(self, rows: int) -> bool:
        return self.are_pushed

    def part(self, slot: int, rows: int) -> Any:
        # Slots take turns.
        assert slot == self.sums % 2
        return self.slots[slot][:rows]

    def parts(self, slot: int) -> int:
        return slot

    def pushed_norm(self, part: Any, inboxes: Any, room: int, *others: Any, **options: Any) -> Any:
        self.ways.add("pushed")
        assert len(part) <= room
        return self._normed(part, *others, **options)

    def summed_norm(self, part: Any, slot: int, *others: Any, **options: Any) -> Any:
        self.ways.add("read")
        return self._normed(part, *others, **options)

    def _normed(self, part: Any, *others: Any, bias: Any, unit_offset: bool, dtype: Any) -> Any:
        *_, x, weight, eps = others
        self.sums += 1
        total = all_reduce.all_reduce(part.clone(), self.group)
        part.fill_(float("nan"))
        return products.add_rms_norm(
            total if bias is None else total + bias, x, weight, eps, unit_offset=unit_offset, dtype=dtype
        )


def generate_by_peers(path: str, call: dict[str, Any], pushes: bool = False) -> tuple[Any, Any, int, set[str]]:
    model = load(path)
    with (
        reexecuted_loop(),
        fused_in_torch(),
        hf_fastattn.patched(model, cuda_graphs=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        ranks = model._fastattn.runtime.ranks
        slots = Slots(ranks._group, model.config.hidden_size, pushes)
        patch.setattr(ranks, "peers", slots)
        slots.late = torch.zeros(1)
        patch.setattr(products, "summed_norm", slots.summed_norm)
        patch.setattr(products, "pushed_norm", slots.pushed_norm)
        return *one(model, call), slots.sums, slots.ways


def generate_in_halves(
    path: str, call: dict[str, Any], slots: bool, unable: int | None = None
) -> tuple[Any, Any, list[tuple[int, ...]]]:
    """Tokens and counters of a call whose prompt is computed in two halves, and the shapes of the sums made meanwhile.

    `unable`: a rank whose modules do not allow it.
    """
    model = load(path)
    with (
        reexecuted_loop(),
        fused_in_torch(),
        hf_fastattn.patched(model, cuda_graphs=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (("FEWEST_TOKENS", 8), ("FEWEST_PRODUCTS", 1), ("TILE", 24), ("most_tokens", lambda _: 0)):
            patch.setattr(halves, name, value)
        own = model._fastattn.runtime.ranks
        later = (LaterSlots if slots else WatchedSums)(own._group, model.config.hidden_size)
        patch.setattr(own, "later_sums", lambda *_: later)
        if rank() == unable:
            patch.setattr(agreed_request, "halves_from", lambda *_: 0)
        return *one(model, call), later.shapes


class WatchedSums:
    """Sums by the process group, whose result is not to be read before it was waited for."""

    def __init__(self, group: Any, hidden: int) -> None:
        self.group, self.hidden, self.shapes = group, hidden, list[tuple[int, ...]]()

    def room(self, rows: int) -> Any:
        return torch.empty(rows, self.hidden)

    def begin(self, part: Any, bias: Any) -> LaterSum:
        self.shapes.append(tuple(part.shape))
        total = part.clone()
        work = torch.distributed.all_reduce(total, group=self.group, async_op=True)
        part.fill_(float("nan"))
        return LaterSum(part, torch.zeros_like(part), bias, lambda: (work.wait(), part.copy_(total)))


class LaterSlots(WatchedSums):
    """Stands for sums by copies: a slot is not written again before the norm has read it."""

    def __init__(self, group: Any, hidden: int) -> None:
        super().__init__(group, hidden)
        self.slots = [torch.full((128, hidden), float("nan")) for _ in range(CopiedSums.SLOTS)]

    def room(self, rows: int) -> Any:
        return self.slots[len(self.shapes) % CopiedSums.SLOTS][:rows]

    def begin(self, part: Any, bias: Any) -> LaterSum:
        assert part.data_ptr() == self.room(len(part)).data_ptr()
        self.shapes.append(tuple(part.shape))
        parts = [torch.empty_like(part) for _ in range(2)]
        work = torch.distributed.all_gather(parts, part.clone(), group=self.group, async_op=True)
        other = torch.full_like(part, float("nan"))
        return LaterSum(part, other, bias, lambda: (work.wait(), other.copy_(parts[1 - rank()])))


def generate_with_own_seed(path: str, call: dict[str, Any]) -> tuple[Any, Any]:
    """A call with another seed on each rank: that of the call on rank 0."""
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True):
        return one(model, {**call, "seed": call["seed"] + rank()})


def generate_and_stock(path: str, call: dict[str, Any], by_expert: bool = False) -> tuple[Any, Any]:
    """A call patched, and unpatched; `by_expert`: a rank holds some experts, not a part of each."""
    loading = {"by_expert": True} if by_expert else {}
    found = generate(path, [dict(call)], False, **loading)
    with torch.no_grad():
        return found, load(path, **loading).generate(**call)


def errors_of_cut_heads(path: str, call: dict[str, Any]) -> tuple[str, str, Any, int]:
    """What a call raises, patched and not; the reason that was counted; pages that are still held."""
    model, texts = load(path), []
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True):
        texts.append(_error_of(model, call))
        report = hf_fastattn.report(model)
    return texts[0], _error_of(model, call), next(iter(report.last_call.fallbacks), None), report.pages_in_use


def _error_of(model: Any, call: dict[str, Any]) -> str:
    try:
        with torch.no_grad():
            model.generate(**call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def generate_with_other_keys(path: str, call: dict[str, Any]) -> tuple[Any, Any, Any, list[int], list[int]]:
    """Tokens with the weights as they were loaded, others, and as before; captures; heads held, and after unpatching."""
    model = load(path)
    linears = [layer.self_attn.k_proj for layer in model.model.layers]
    found, captured = [], []
    with reexecuted_loop(), fused_in_torch(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        for factor in (1.0, -1.5, -1 / 1.5):
            for linear in linears:
                local_of(linear.weight).mul_(factor)
            tokens, counted = one(model, call)
            found.append(tokens)
            captured.append(counted.graphs_captured)
        held = len(shared_heads._wholes)
    return found[0], found[1], found[2], captured, [held, len(shared_heads._wholes)]


def forward_over_pages(path: str, ids: Any) -> tuple[Any, int]:
    """Logits of a forward with a cache of its own, and forwards counted."""
    model = load(path)
    with hf_fastattn.patched(model), torch.no_grad():
        cache = hf_fastattn.PagedCache(model.config)
        logits = model(ids, past_key_values=cache).logits
        cache.reset()
        return logits, model._fastattn.runtime.counters.forwards


def errors_without_pages(path: str, ids: Any) -> list[str]:
    """What a forward without pages raises, patched and not."""
    model, texts = load(path), []
    for patched in (True, False):
        with hf_fastattn.patched(model) if patched else contextlib.nullcontext(), torch.no_grad():
            try:
                model(ids)
            except Exception as error:
                texts.append(f"{type(error).__name__}: {error}")
    return texts


def why_not(path: str) -> str | None:
    return why_not_understood(load(path))


def reasons_after_changes(path: str) -> list[str | None]:
    """Why the model is not understood: as it was loaded, with a wrapped forward, as before, with a weight of its own, as
    before."""
    model = load(path)
    linear, found = model.model.layers[1].mlp.up_proj, [why_not_understood(model)]
    forward, weight = linear.forward, linear._parameters["weight"]
    linear.forward = lambda x: forward(x)
    found.append(why_not_understood(model))
    linear.forward = forward
    found.append(why_not_understood(model))
    linear._parameters["weight"] = torch.nn.Parameter(local_of(weight).clone())
    found.append(why_not_understood(model))
    linear._parameters["weight"] = weight
    return [*found, why_not_understood(model)]


def error_of_other_prompts(path: str, ids: Any, vocabulary: int) -> str:
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        try:
            model.generate((ids + rank()) % vocabulary, max_new_tokens=4, do_sample=False)
        except ValueError as error:
            # The group can be used as before.
            model.generate(ids, max_new_tokens=4, do_sample=False)
            return f"{type(error).__name__}: {error}"
    return ""


class Same(LogitsProcessor):
    """Changes nothing, but no loop knows that."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


def generate_with_a_processor_on_rank_1(path: str, call: dict[str, Any]) -> tuple[Any, Any]:
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True):
        return one(model, {**call, "logits_processor": [Same()] * rank()})


def error_of_other_options(path: str, call: dict[str, Any]) -> str:
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=rank() == 0):
        try:
            one(model, call)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def generate_with_a_failing_capture(path: str, call: dict[str, Any]) -> tuple[Any, Any]:
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), pytest.MonkeyPatch.context() as patch:
        capture = ReexecutedLoopStep.capture

        def failing(self: Any, run: Any, warmed_up: Any) -> None:
            capture(self, run, warmed_up)
            if rank() == 1:
                raise RuntimeError("no memory")

        patch.setattr(ReexecutedLoopStep, "capture", failing)
        return one(model, call)


def generate_after_rank_1_released(path: str, call: dict[str, Any]) -> tuple[Any, Any]:
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True):
        one(model, call)
        if rank() == 1:
            hf_fastattn.release_memory(model)
        return one(model, call)


def patched_and_unpatched(path: str) -> bool:
    model = load(path)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False)
    after = [(type(module), dict(vars(module))) for module in model.modules()]
    return [(kind, state.get("forward")) for kind, state in before] == [
        (kind, state.get("forward")) for kind, state in after
    ]
