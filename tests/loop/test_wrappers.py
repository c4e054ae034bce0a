"""Models in wrappers: those that change nothing, with recorded steps; others are called as in stock.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.patches.snapshots import lora
from tests.tools.accelerator import own_accelerator
from tests.tools.models import assert_fast, patch_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop

NEW = 8


@pytest.mark.parametrize("patched_first", [False, True])
def test_peft(patched_first: bool, device: str) -> None:
    inner = tiny("llama").to(device)
    model = lora(patch_with_graphs(inner)) if patched_first else patch_with_graphs(lora(inner))
    stock = lora(tiny("llama")).to(device)
    for side in (model.to(device), inner):
        assert torch.equal(run(side, NEW), run(stock, NEW))
        assert_looped(side)
    assert not torch.equal(run(model, NEW), run(tiny("llama").to(device), NEW))
    hf_fastattn.unpatch(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_head_for_losses_of_trl(prepared: bool, patched_first: bool, device: str) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny("llama").to(device)
    if patched_first:
        patch_with_graphs(model)
    utils.add_fused_lm_head(model)
    with own_accelerator():
        model = Accelerator(cpu=device == "cpu").prepare(model) if prepared else model
    patch_with_graphs(model)
    assert torch.equal(run(model, NEW), run(tiny("llama").to(device), NEW))
    assert_looped(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=device)
    assert model(ids, labels=ids, fused_lm_head=True).log_probs.shape[-1] == 3


@pytest.mark.parametrize("patched_first", [False, True])
def test_prepared_without_mixed_precision(patched_first: bool, device: str) -> None:
    model = tiny("llama").to(device)
    if patched_first:
        patch_with_graphs(model)
    with own_accelerator():
        accelerator = Accelerator(cpu=device == "cpu")
        prepared = accelerator.prepare(model)
        patch_with_graphs(prepared)
        for side in (prepared, accelerator.unwrap_model(prepared)):
            assert torch.equal(run(side, NEW), run(tiny("llama").to(device), NEW))
            assert_looped(side)


def wrapping_it(model: Any, seen: list[Any]) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        out = inner(*args, **kwargs)
        out.logits = out.logits.roll(1, -1)
        return out

    model.forward = forward


def by_a_bound_method(model: Any, seen: list[Any]) -> None:
    """With all attributes of ours, were it patched."""
    wrapping_it(model, seen)
    model.forward = functools.wraps(type(model).forward)(model.forward)


def observing(model: Any, seen: list[Any]) -> None:
    model.register_forward_hook(lambda *given: seen.append(model))


def observing_before(model: Any, seen: list[Any]) -> None:
    model.register_forward_pre_hook(lambda *given: seen.append(model))


def louder_attention(model: Any, seen: list[Any]) -> None:
    attention = model.model.layers[1].self_attn
    inner = attention.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        out = inner(*args, **kwargs)
        return (1.5 * out[0], *out[1:])

    attention.forward = forward.__get__(attention)


@pytest.mark.parametrize("wrap", [wrapping_it, by_a_bound_method, observing, observing_before, louder_attention])
def test_wrappers_that_are_not_known_are_called(wrap: Callable[..., None], device: str) -> None:
    stock, model, seen = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device)), list[Any]()
    run(model, NEW)
    assert_looped(model)
    before = run(stock, NEW)
    for side in (stock, model):
        wrap(side, seen)
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and torch.equal(want, before) == (wrap in (observing, observing_before))
    assert sum(each is stock for each in seen) == sum(each is model for each in seen) == NEW
    call = assert_fast(model, fallbacks=("padding stays",) if wrap is louder_attention else ())
    assert call.fast_loops == 0 and any("replaced" in reason or "hooks" in reason for reason in call.not_looped)


def test_the_forward_of_the_models_class_replaced(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    before, inner = run(model, NEW), type(stock).forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = inner(self, *args, **kwargs)
        out.logits = out.logits.roll(1, -1)
        return out

    monkeypatch.setattr(type(stock), "forward", forward)
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    call = assert_fast(model)
    assert call.fast_loops == 0 and any("LlamaForCausalLM was replaced" in reason for reason in call.not_looped)


class Halved(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("where", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("known", [False, True])
def test_parametrized_weights(known: bool, where: str, device: str) -> None:
    stock, model = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    before = run(model, NEW)
    for side in (stock, model):
        module = side.get_submodule(where)
        if known:
            parametrizations.weight_norm(module)
            with torch.no_grad():
                module.parametrizations.weight.original0.mul_(1.5)
        else:
            parametrize.register_parametrization(module, "weight", Halved())
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want)
    # Twice the scale of all logits chooses the same tokens.
    assert where == "lm_head" or not torch.equal(want, before)
    call = assert_fast(model, fallbacks=() if known or where == "lm_head" else ("padding stays",))
    assert call.fast_loops == known
    assert known or any("may do more than launch kernels" in reason for reason in call.not_looped)


def test_data_parallel_wrappers(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with reexecuted_loop():
            for wrap in (nn.parallel.DistributedDataParallel, nn.DataParallel):
                wrapped: Any = wrap(tiny("llama"))
                assert patch_with_graphs(wrapped) is wrapped
                assert torch.equal(run(wrapped.module, NEW), run(tiny("llama"), NEW))
                assert_looped(wrapped)
                hf_fastattn.unpatch(wrapped)
                assert torch.equal(run(wrapped.module, NEW), run(tiny("llama"), NEW))
    finally:
        torch.distributed.destroy_process_group()
