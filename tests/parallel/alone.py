"""Calls in which one rank alone has, or is given, something that the others have not; in each of the processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.loop import decode_loop
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.parallel import watch
from tests.parallel.ranks import Same, load, rank
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.reexecuted import reexecuted_loop


class Never(StoppingCriteria):
    """Ends no row."""

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Counts:
    """A streamer of a user's."""

    def __init__(self) -> None:
        self.seen = 0

    def put(self, value: Any) -> None:
        self.seen += 1

    def end(self) -> None:
        self.seen += 1


@contextlib.contextmanager
def hooked(model: Any, name: str = "model.layers.1.mlp") -> Iterator[dict[str, Any]]:
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, outputs: None)
    try:
        yield {}
    finally:
        handle.remove()


@contextlib.contextmanager
def wrapped(model: Any) -> Iterator[dict[str, Any]]:
    module = model.model.layers[1].input_layernorm
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    try:
        yield {}
    finally:
        del module.forward


@contextlib.contextmanager
def training(model: Any) -> Iterator[dict[str, Any]]:
    model.train()
    try:
        yield {}
    finally:
        model.eval()


@contextlib.contextmanager
def eager(model: Any) -> Iterator[dict[str, Any]]:
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield {}
    finally:
        model.config._attn_implementation = before


def giving(**options: Any) -> Any:
    return lambda model: contextlib.nullcontext({name: make() for name, make in options.items()})


@contextlib.contextmanager
def gradients(model: Any) -> Iterator[dict[str, Any]]:
    with torch.enable_grad():
        yield {}


CHANGES: dict[str, Any] = {
    "hook": hooked, "hook on the head": functools.partial(hooked, name="lm_head"),
    "wrapped forward": wrapped, "train mode": training, "eager": eager,
    "gradients": gradients,
    "processor": giving(logits_processor=lambda: [Same()]),
    "criterion": giving(stopping_criteria=lambda: [Never()]),
    "streamer": giving(streamer=Counts),
    "dict": giving(return_dict_in_generate=lambda: True),
    "scores": giving(return_dict_in_generate=lambda: True, output_scores=lambda: True),
    "dynamic cache": giving(past_key_values=DynamicCache),
    "static cache": giving(cache_implementation=lambda: "static"),
    "lookup": giving(prompt_lookup_num_tokens=lambda: 3),
    "synced": giving(synced_gpus=lambda: True),
    "no cache": giving(use_cache=lambda: False),
    "shorter": giving(max_new_tokens=lambda: 5),
    "own paged": giving(past_key_values=lambda: "paged"),
    "nothing": giving(),
}  # fmt: skip


def generated(path: str, what: str, call: dict[str, Any], where: int, times: int, **options: Any) -> Any:
    """Tokens, counters of each of some calls that one rank alone takes with a change, and of one without it after them."""
    model, found = load(path), []
    with reexecuted_loop(), fused_in_torch(), hf_fastattn.patched(model, cuda_graphs=True, **options):
        for number in range(times + 1):
            change = CHANGES[what] if rank() == where and number < times else giving()
            with change(model) as more, torch.no_grad() if what != "gradients" else contextlib.nullcontext():
                if more.get("past_key_values") == "paged":
                    more["past_key_values"] = hf_fastattn.PagedCache(model.config)
                given = {**call, **more}
                torch.manual_seed(given.pop("seed", 0))
                tokens = model.generate(**given)
            tokens = getattr(tokens, "sequences", tokens)
            found.append((tokens.detach(), hf_fastattn.report(model).last_call))
    return found


def stock(path: str, what: str, call: dict[str, Any], where: int) -> Any:
    model = load(path)
    with (CHANGES[what] if rank() == where else giving())(model) as more, torch.no_grad():
        if more.get("past_key_values") == "paged":
            more["past_key_values"] = None
        given = {**call, **more}
        torch.manual_seed(given.pop("seed", 0))
        tokens = model.generate(**given)
        return getattr(tokens, "sequences", tokens)


def generated_with_prefixes(path: str, calls: list[dict[str, Any]], what: str, number: int) -> list[tuple[Any, Any]]:
    """Tokens and counters of calls whose prompts go on from those before; rank 1 alone does `what` before call `number`.

    With "streamer" it gives that call a streamer of a user's; with "released" it gives its memory back; with "replaced" it
    has another tensor of the same values in the place of a weight.
    """
    model, found = load(path), []
    weight = model.model.norm.weight
    with reexecuted_loop(), fused_in_torch(), hf_fastattn.patched(
        model, cuda_graphs=True, prefix_cache=True, weights="frozen", page_size=4
    ), torch.no_grad():  # fmt: skip
        for place, call in enumerate(calls):
            mine = rank() == 1 and place == number
            if mine and what == "released":
                hf_fastattn.release_memory(model)
            if mine and what == "replaced":
                model.model.norm.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            tokens = model.generate(**call, **({"streamer": Counts()} if mine and what == "streamer" else {}))
            found.append((tokens, hf_fastattn.report(model).last_call))
        model.model.norm.weight = weight
    return found


class StopsEarly(StoppingCriteria):
    """Ends all rows after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


class Prefers(LogitsProcessor):
    """Has a token chosen."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, self.token] = 1e4
        return scores


def stops_alone(path: str) -> str:
    """The error of a call that a criterion ends on rank 1 alone."""
    watch.POLL, watch.GRACE, watch.SILENT = 0.1, 1.0, 3.0
    model = load(path)
    given = {"stopping_criteria": [StopsEarly(3) if rank() == 1 else Never()], "max_new_tokens": 30, "do_sample": False}
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        return outcome(lambda: model.generate(torch.ones(1, 8, dtype=torch.long), **given))


def outcome(function: Any) -> str:
    """The error that it raises, or ""."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_and_next(path: str, call: dict[str, Any], what: str) -> tuple[str, str, Any]:
    """The error of a call in which rank 1 is given something else, that of a call after it, and that call's counters."""
    model, given = load(path), dict(call)
    if rank() == 1:
        given |= {
            "prompt": lambda: {"input_ids": (call["input_ids"] + 1) % 128},
            "shorter": lambda: {"max_new_tokens": 5},
            "longer prompt": lambda: {"input_ids": torch.cat((call["input_ids"],) * 2, 1), "attention_mask": None},
            "cache": lambda: {"use_cache": False},
            "end": lambda: {"eos_token_id": 5},
            "strategy": lambda: {"num_beams": 2},
            "synced": lambda: {"synced_gpus": True},
            "tokens": lambda: {"logits_processor": [Prefers(7)]},
        }[what]()
    elif what == "tokens":
        given["logits_processor"] = [Prefers(9)]
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        hooks = [model.model.layers[0].register_forward_hook(lambda *_: None)] if "hooked" in call else []
        given.pop("hooked", None)
        first = outcome(lambda: model.generate(**given))
        for hook in hooks:
            hook.remove()
        call.pop("hooked", None)
        second = outcome(lambda: model.generate(**call))
        report = hf_fastattn.report(model)
        assert report.pages_in_use == 0
    return first, second, report.last_call


def drawn_in_transformers_loop(path: str, call: dict[str, Any]) -> tuple[Any, Any, float]:
    """A call of another seed on each rank whose tokens Transformers draws; what this rank draws after it."""
    model = load(path)
    with reexecuted_loop(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        torch.manual_seed(call.pop("seed") + rank())
        tokens = model.generate(**call, logits_processor=[Same()])
        return tokens, hf_fastattn.report(model).last_call, float(torch.rand(1))


def stock_draws(path: str, call: dict[str, Any]) -> Any:
    with torch.no_grad():
        torch.manual_seed(call.pop("seed"))
        return load(path).generate(**call)


def generated_with_replaced_weight(path: str, call: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Two calls, between which rank 1 alone has another tensor in the place of a weight."""
    model, found = load(path), []
    weight = model.model.norm.weight
    with reexecuted_loop(), fused_in_torch(), hf_fastattn.patched(model, cuda_graphs=True), torch.no_grad():
        for number in range(3):
            if number == 1 and rank() == 1:
                model.model.norm.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            found.append((model.generate(**call), hf_fastattn.report(model).last_call))
        model.model.norm.weight = weight
    return found


def errors_of_unpatched(path: str, call: dict[str, Any]) -> str:
    """What a call raises once rank 1 alone has unpatched the model; nobody calls there."""
    model = load(path)
    hf_fastattn.patch(model, cuda_graphs=True)
    try:
        torch.distributed.barrier()
        if rank() == 1:
            hf_fastattn.unpatch(model)
        torch.distributed.barrier()
        with reexecuted_loop(), torch.no_grad():
            return outcome(lambda: model.generate(**call)) if rank() == 0 else ""
    finally:
        hf_fastattn.unpatch(model)


def without_memory_for_pages(path: str, call: dict[str, Any], on: tuple[int, ...]) -> tuple[str, str, Any]:
    """The error of a call whose pages cannot grow on these ranks, that of the next, and its counters."""
    model = load(path)
    with (
        reexecuted_loop(),
        hf_fastattn.patched(model, cuda_graphs=True),
        torch.no_grad(),
        pytest.MonkeyPatch.context() as patch,
    ):
        # Pages for a few tokens more at a time.
        patch.setattr(columns_at_once, "FIRST", 8)
        patch.setattr(decode_loop, "AHEAD", 8)
        grow, failed = PageStorage.grow, []

        def failing(self: Any, capacity: int) -> None:
            if rank() in on and not failed and self.capacity < capacity:
                failed.append(capacity)
                raise torch.OutOfMemoryError("simulated")
            grow(self, capacity)

        patch.setattr(PageStorage, "grow", failing)
        first = outcome(lambda: model.generate(**call))
        assert bool(failed) == (rank() in on)
        return first, outcome(lambda: model.generate(**call)), hf_fastattn.report(model).last_call
