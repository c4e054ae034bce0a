"""Faults that the evaluations must notice, planted in a patched model for the length of a `with` block.

Each is a mistake that a paged cache invites, in a form chosen to be quiet: nothing crashes and no NaN gives it away.
They live in hooks on the attention modules and routers of this one model and change what a layer reads, so that they hold
for every backend and nothing of them is in the product. `scale` and `window` act on every forward, the others where there
is a past: in appends and decode.

    page      The two newest pages of the longest row are exchanged in the table that attention reads. (To exchange two
              full pages that a query sees whole changes nothing: attention doesn't care for the order of keys, and
              they carry their positions. So the last, partial page takes part.) Slots that were never written are
              zeroed, lest old bits give it away.
    position  The key of an appended token is stored as if it stood one position further on; its query is right. (Where
              a family normalises keys, they are turned before the norm, which comes to nearly the same.)
    mask      In decode a token doesn't see its own key, the newest.
    scale     Scores are multiplied by 1.03.
    window    A sliding window is one page too short.

One is a mistake of 8-bit keys and values, in every forward:

    kv_scale  The scales of the keys of one head, of its new tokens, are stored 1.1 times as large as they are.

Two are mistakes of a router, in every forward of a model with experts:

    expert    The second of a token's experts is taken for the first, and the first for the second.
    weights   The weights of a token's experts do not add up to 1: they are those of the softmax over all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.eval.accuracy.step_faults import planted_in_steps
from hf_fastattn.eval.choices import FAULTS, FORMAT_FAULTS, ROUTING_FAULTS, STEP_FAULTS
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.rope_reference import rotate, signed_sin
from hf_fastattn.kernels.page_formats import is_eight_bits, page_scales
from hf_fastattn.patches.modules.watched import takes_packed_rows
from hf_fastattn.patching import find_model
from hf_fastattn.transformers_version import CACHE

SCALE_FACTOR = 1.03
FORMAT_FACTOR = 1.1


@dataclass
class Planted:
    """How many times a fault changed what a layer read."""

    times: int = 0

    def once(self) -> None:
        """It did so once more."""
        self.times += 1


@contextmanager
def planted(model: Any, fault: str | None, layer: int | None = None) -> Iterator[Planted]:
    """Plant `fault` in a patched model, in all layers or in one; None plants nothing.

    Raises:
        ValueError: the fault is unknown, the model is not patched, has no such layer, has no window to shorten, or no router
            whose weights add up to 1.
    """
    count = Planted()
    if fault is None:
        yield count
        return
    known = (*FAULTS, *ROUTING_FAULTS, *FORMAT_FAULTS, *STEP_FAULTS)
    if fault not in known:
        raise ValueError(f"fault {fault!r} is unknown; choose one of {known}")
    modules = _attention_modules(model)
    if fault in STEP_FAULTS:
        if layer is not None:
            raise ValueError(f"fault {fault!r} is in whole steps; leave out the layer")
        with planted_in_steps(model, fault, count.once):
            yield count
        return
    if fault in ROUTING_FAULTS:
        modules = _routers(model)
    if layer is not None and not 0 <= layer < len(modules):
        raise ValueError(f"layer {layer} does not exist; the model has {len(modules)}")
    chosen = modules if layer is None else [modules[layer]]
    if fault in ROUTING_FAULTS:
        undo = _plant_in_router(chosen, _ROUTING_FAULTS[fault], count)
    elif fault == "scale":
        undo = _plant_scale(chosen, count)
    elif fault == "kv_scale":
        undo = _plant_key_scales(chosen, count)
    elif fault == "position":
        undo = _plant_position(model, chosen, count)
    else:
        undo = _plant_in_plan(chosen, _PLAN_FAULTS[fault], count)
    try:
        yield count
    finally:
        for action in undo:
            action()


def _attention_modules(model: Any) -> list[Any]:
    target = find_model(model)
    state = vars(target).get("_fastattn")
    if state is None:
        raise ValueError("the model is not patched: faults are planted in the paged path")
    named = (target.get_submodule(name) for name in state.modules)
    return [module for module in named if hasattr(module, "k_proj")]


def _routers(model: Any) -> list[Any]:
    """Of the layers that have experts."""
    target = find_model(model)
    blocks = [module for name, module in target.named_modules() if name.endswith(".mlp")]
    found = [block.gate for block in blocks if hasattr(block, "gate") and hasattr(block, "experts")]
    if not found or not all(getattr(router, "norm_topk_prob", True) for router in found):
        raise ValueError(f"a {target.config.model_type} has no router whose weights add up to 1: no fault to plant there")
    return found


def _batch_of(kwargs: dict[str, Any]) -> tuple[PagedCache | None, Batch | None]:
    cache = kwargs.get(CACHE)
    return (cache, cache.paged_batch) if isinstance(cache, PagedCache) else (None, None)


def _has_past(plan: ReadPlan) -> bool:
    return all(have > new for have, new in zip(plan.seq_lens, plan.query_lens, strict=True))


# ---- in what is read ----------------------------------------------------------------------------------------------


def _newest_pages_exchanged(plan: ReadPlan) -> ReadPlan:
    row = _longest(plan)
    last = (plan.seq_lens[row] - 1) // plan.page_size
    if last < 1 or plan.pages[row][last - 1] < 0 or not _has_past(plan):
        return plan
    pages = [list(columns) for columns in plan.pages]
    pages[row][last - 1], pages[row][last] = pages[row][last], pages[row][last - 1]
    return replace(plan, pages=pages, _indices={})


def _longest(plan: ReadPlan) -> int:
    return max(range(len(plan.seq_lens)), key=lambda row: plan.seq_lens[row])


def _newest_key_hidden(plan: ReadPlan) -> ReadPlan:
    if not (plan.is_decode and _has_past(plan)):
        return plan
    window = None if plan.window is None else plan.window - 1
    return replace(plan, seq_lens=[length - 1 for length in plan.seq_lens], window=window, _indices={})


def _window_one_page_short(plan: ReadPlan) -> ReadPlan:
    if plan.window is None:
        raise ValueError("fault 'window' needs a model with a sliding window; --window N loads a Llama as one")
    if plan.window <= plan.page_size:
        raise ValueError(f"a window of {plan.window} has no page of {plan.page_size} tokens to lose")
    return replace(plan, window=plan.window - plan.page_size, _indices={})


_PLAN_FAULTS = {"page": _newest_pages_exchanged, "mask": _newest_key_hidden, "window": _window_one_page_short}


def _plant_in_plan(modules: list[Any], change: Callable[[ReadPlan], ReadPlan], count: Planted) -> list[Callable[[], None]]:
    """While one of `modules` runs, its batch is one with changed plans, made once a forward."""
    true_batches: list[Batch] = []
    made: list[tuple[Batch, Batch]] = []

    @takes_packed_rows
    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache, batch = _batch_of(kwargs)
        if cache is None or batch is None:
            return
        if not made or made[0][0] is not batch:
            plans = {window: change(plan) for window, plan in batch.known.plans.items()}
            made[:] = [(batch, _with_plans(batch, plans))]
        faulty = made[0][1]
        window = cache.layers[module.layer_idx].window
        count.times += faulty.known.plans[window] is not batch.known.plans[window]
        if change is _newest_pages_exchanged:
            _zero_unwritten(cache, module.layer_idx, batch.known.plans[window])
        true_batches.append(batch)
        cache._batch = faulty

    @takes_packed_rows
    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, batch = _batch_of(kwargs)
        if cache is not None and batch is not None and true_batches:
            cache._batch = true_batches.pop()

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    return [handle.remove for handle in handles]


class _FaultyBatch(Batch):
    """A batch whose plans may have another window than the layer."""

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, **options: Any) -> Tensor:
        return super().attend(q, k_pages, v_pages, self.known.plans[window].window, **options)


def _with_plans(batch: Batch, plans: dict[int | None, ReadPlan]) -> Batch:
    """A copy of the batch that reads by `plans`, and has made no tensor from them yet."""
    by_window = {**plans, **{plan.window: plan for plan in plans.values()}}
    host = replace(batch.known, plans=by_window, seq_lens=list(next(iter(plans.values())).seq_lens))
    return _FaultyBatch(**vars(Batch.from_host(host, batch.options)))


def _zero_unwritten(cache: PagedCache, layer_idx: int, plan: ReadPlan) -> None:
    held = cache.groups.group(plan.window).storage.pages(layer_idx)
    if held is None:
        return
    # The layer would add the pages of this forward only later, with whatever was in memory.
    pages = cache.pages_for(layer_idx, held[0])
    row = _longest(plan)
    last, filled = divmod(plan.seq_lens[row] - 1, plan.page_size)
    for tensor in pages:
        tensor[plan.pages[row][last], filled + 1 :] = 0


# ---- in a router -------------------------------------------------------------------------------------------------


def _second_for_first(logits: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    order = [1, 0, *range(2, chosen.shape[-1])] if chosen.shape[-1] > 1 else [0]
    return weights, chosen[..., order]


def _not_adding_up(logits: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().softmax(-1).gather(-1, chosen).to(weights.dtype), chosen


_ROUTING_FAULTS = {"expert": _second_for_first, "weights": _not_adding_up}


def _plant_in_router(
    routers: list[Any], change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], count: Planted
) -> list[Callable[[], None]]:
    @takes_packed_rows
    def after(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        count.times += 1
        return output[0], *change(*output)

    return [router.register_forward_hook(after).remove for router in routers]


# ---- in keys and scores -------------------------------------------------------------------------------------------


def _plant_scale(modules: list[Any], count: Planted) -> list[Callable[[], None]]:
    @takes_packed_rows
    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        count.times += _batch_of(kwargs)[1] is not None

    undo: list[Callable[[], None]] = []
    for module in modules:
        right = module.scaling
        module.scaling = right * SCALE_FACTOR
        undo.append(lambda module=module, right=right: setattr(module, "scaling", right))  # type: ignore[misc]
        undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    return undo


def _plant_key_scales(modules: list[Any], count: Planted) -> list[Callable[[], None]]:
    @takes_packed_rows
    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, batch = _batch_of(kwargs)
        if cache is None or batch is None:
            return
        window = cache.layers[module.layer_idx].window
        held = cache.groups.group(window).storage.pages(module.layer_idx)
        if held is None or not is_eight_bits(held[0]):
            raise ValueError("fault 'kv_scale' needs a layer with 8-bit keys and values; patch with kv_dtype")
        slots, size = batch.on(held[0].device).slots[window], held[0].shape[1]
        scales = page_scales(held[0])[:, 0, :, 0]
        scales[slots // size, slots % size] *= FORMAT_FACTOR
        count.times += 1

    return [module.register_forward_hook(after, with_kwargs=True).remove for module in modules]


def _plant_position(model: Any, modules: list[Any], count: Planted) -> list[Callable[[], None]]:
    """Rotations add up: a key that RoPE will turn by p positions is turned by one more on its way out of `k_proj`."""
    with torch.no_grad():
        rotary = next(module for name, module in find_model(model).named_modules() if name.endswith("rotary_emb"))
        device = find_model(model).device
        cos, sin = rotary(torch.zeros(1, device=device), torch.ones(1, 1, dtype=torch.long, device=device))
        # Some RoPE scalings lengthen the vectors too; here only the angle is wanted.
        length = torch.sqrt(cos.square() + sin.square())
        cos, sin = (cos / length)[0], signed_sin(sin / length)[0]
    appending: list[bool] = []

    @takes_packed_rows
    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache, batch = _batch_of(kwargs)
        plan = None if cache is None or batch is None else batch.known.plans[cache.layers[module.layer_idx].window]
        appending[:] = [plan is not None and _has_past(plan)]
        count.times += appending[0]

    def turn(dim: int) -> Callable[[Any, Any, Tensor], Tensor | None]:
        @takes_packed_rows
        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not (appending and appending[0]):
                return None
            keys = output.reshape(-1, output.shape[-1] // dim, dim)
            return rotate(keys, cos.to(keys), sin.to(keys)).reshape(output.shape)

        return hook

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.k_proj.register_forward_hook(turn(module.head_dim)))
    return [handle.remove for handle in handles]
