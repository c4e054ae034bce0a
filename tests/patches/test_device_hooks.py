"""accelerate's hooks that move tensors to where they are change nothing: steps are recorded, layers fused.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.wrappers import moves_nothing
from tests.loop.test_autocast import nearly_best, prepared
from tests.loop.test_decode_loop import assert_looped, run
from tests.patches.snapshots import generate, lora, snapshot
from tests.tools.accelerator import own_accelerator
from tests.tools.fused_layers import assert_fused, build, count_launches
from tests.tools.models import assert_fast, padded_batch, patch_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop

NEW = 12
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


def dispatched(model: Any) -> None:
    """As `from_pretrained(device_map={"": 0})` dispatches a model that needs hooks: all of it on its device."""
    place = model.device.type if model.device.index is None else model.device.index
    dispatch_model(model, {"": place}, force_hooks=True, skip_keys=CACHE)


def dispatched_in_parts(model: Any) -> None:
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(model, dict.fromkeys(parts, model.device), force_hooks=True)


def on_every_module(model: Any) -> None:
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device=model.device, io_same_device=True))


def in_sequence(model: Any) -> None:
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
        add_hook_to_module(module, AlignDevicesHook(execution_device=model.device), append=True)
    assert isinstance(model._hf_hook, SequentialHook)


HOOKED = [dispatched, dispatched_in_parts, on_every_module, in_sequence]


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("hook", HOOKED)
def test_tokens_and_undo(hook: Callable[[Any], None], patched_first: bool, device: str) -> None:
    stock, model = tiny("qwen3").to(device), tiny("qwen3").to(device)
    want = run(stock, NEW)
    if patched_first:
        patch_with_graphs(model)
        run(model, NEW)
    hook(model)
    before = snapshot(model)
    if not patched_first:
        patch_with_graphs(model)
    for _ in range(2):
        assert torch.equal(run(model, NEW), want)
        assert_looped(model)
    hf_fastattn.unpatch(model)
    assert all("_hf_hook" in vars(module) for module in model.modules() if getattr(module, "weight", None) is not None)
    assert patched_first or snapshot(model) == before
    assert torch.equal(run(model, NEW), want)
    remove_hook_from_submodules(model)
    assert torch.equal(run(model, NEW), want)


@pytest.mark.parametrize("patched_first", [False, True])
def test_hooks_removed_while_patched(patched_first: bool, device: str) -> None:
    """accelerate binds what its hook called to the instance: the forward of its class, or ours."""
    stock, model = tiny("llama").to(device), tiny("llama").to(device)
    if patched_first:
        patch_with_graphs(model)
    dispatched(model)
    patch_with_graphs(model)
    run(model, NEW)
    remove_hook_from_submodules(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)
    hf_fastattn.unpatch(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert not any("fastattn" in str(vars(module).get("forward")) for module in model.modules())
    hf_fastattn.patch(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))


def test_copies_of_hooked_models(device: str) -> None:
    model = tiny("llama").to(device)
    want = run(model, NEW)
    dispatched(model)
    twin = copy.deepcopy(patch_with_graphs(model))
    patch_with_graphs(twin)
    for each in (model, twin):
        assert torch.equal(run(each, NEW), want)
        assert_looped(each)


@pytest.mark.parametrize("hooked_first", [False, True])
def test_beside_autocast(hooked_first: bool, device: str) -> None:
    stock, model = tiny("qwen3", initializer_range=0.1).to(device), tiny("qwen3", initializer_range=0.1).to(device)
    with own_accelerator():
        if hooked_first:
            dispatched(model)
        patch_with_graphs(prepared(model, device))
        if not hooked_first:
            dispatched(model)
        tokens = run(model, NEW, **padded_batch(2, 5))
        assert_looped(model)
    assert model._fastattn.runtime._made_for[0] is torch.bfloat16
    assert nearly_best(stock, tokens, padded_batch(2, 5)["attention_mask"], 5)


@pytest.mark.parametrize("patched_first", [False, True])
def test_beside_adapters(patched_first: bool, device: str) -> None:
    stock, model = lora(tiny("llama")).to(device), lora(tiny("llama")).to(device)
    if patched_first:
        patch_with_graphs(model)
    dispatched(model.get_base_model())
    patch_with_graphs(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = assert_looped(model)
    assert bool(call.adapters_fused) == (device == "cuda")


class Louder(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return 1.5 * output


def test_a_hook_exchanged_between_calls(device: str) -> None:
    """What was recorded without it is not replayed."""
    sides = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    for side in sides:
        dispatched(side)
    before, stock, model = run(sides[1], NEW), *sides
    assert_looped(model)
    for side in sides:
        side.model.layers[1].mlp.down_proj._hf_hook = Louder()
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    call = assert_fast(model, fallbacks=("padding stays: a Linear has a Louder",))
    assert call.fast_loops == 0 and any("a Louder on a Linear" in reason for reason in call.not_looped)


def test_a_function_around_the_hooked_forward(device: str) -> None:
    """`functools.wraps` gives it the attributes of what it wraps."""
    sides = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    before = run(sides[0], NEW)
    for side in sides:
        dispatched(side)
        module = side.model.layers[1].mlp.down_proj
        inner = module.forward
        module.forward = functools.wraps(inner)(lambda x, inner=inner: 1.5 * inner(x))
    stock, model = sides
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    assert hf_fastattn.report(model).last_call.fast_loops == 0


def test_which_hooks_move_nothing() -> None:
    still = AlignDevicesHook("cpu", io_same_device=True, skip_keys=CACHE)
    assert all(moves_nothing(hook, CPU) for hook in (still, AlignDevicesHook(), SequentialHook(still, ModelHook())))
    offloading, gradless, edited = AlignDevicesHook("cpu", offload=True), AlignDevicesHook("cpu"), AlignDevicesHook("cpu")
    gradless.no_grad = True
    edited.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    others = (AlignDevicesHook("meta"), AlignDevicesHook(0), AlignDevicesHook("disk"), SequentialHook(still, Louder()))
    assert not any(moves_nothing(hook, CPU) for hook in (offloading, gradless, edited, Louder(), *others))
    assert moves_nothing(AlignDevicesHook("cuda:1"), torch.device("cuda", 1))
    assert not moves_nothing(AlignDevicesHook("cuda:1"), torch.device("cuda", 0))


OFFLOADED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "cpu": (lambda model, path: cpu_offload(model, CPU), "weights are offloaded"),
    "disk": (lambda model, path: disk_offload(model, str(path), CPU), "weights are offloaded"),
    "a layer": (
        lambda model, path: dispatch_model(
            model, {**dict.fromkeys(("model", "lm_head"), "cpu"), "model.layers.1": "disk"}, offload_dir=str(path)
        ),
        "may change or move tensors: one device needs no hooks",
    ),
}


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("where", OFFLOADED)
def test_offloaded_weights(where: str, patched_first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    offload, reason = OFFLOADED[where]
    stock, model = tiny("llama"), tiny("llama")
    with reexecuted_loop(), caplog.at_level("INFO", "hf_fastattn"):
        if patched_first:
            patch_with_graphs(model)
        offload(model, tmp_path)
        patch_with_graphs(model)
        for _ in range(2):
            assert torch.equal(generate(model), generate(stock))
            call = hf_fastattn.report(model).last_call
            assert call.fast_loops == call.graphs_replayed == 0
            assert any(reason in known for known in (*call.fallbacks, *call.not_looped)), call
    assert sum(reason in record.message and record.levelname == "WARNING" for record in caplog.records) <= 1
    hf_fastattn.unpatch(model)
    assert torch.equal(generate(model), generate(stock))


@pytest.mark.interpreter
@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("hook", [dispatched, in_sequence])
def test_layers_are_fused(hook: Callable[[Any], None], patched_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: Counter[str] = count_launches(monkeypatch)
    stock, model = build("llama"), build("llama")
    if patched_first:
        hf_fastattn.patch(model)
    hook(model)
    hf_fastattn.patch(model)
    assert_fused("hooked", stock, model, launched)


@pytest.mark.gpu
def test_inputs_that_are_elsewhere() -> None:
    """The hook on the model brings them, and brings the logits back: the device's loop would read them where they are."""
    stock, model = tiny("llama").to("cuda"), patch_with_graphs(tiny("llama").to("cuda"))
    for side in (stock, model):
        dispatched(side)
    options = {"max_new_tokens": NEW, "do_sample": False}
    want = stock.generate(**padded_batch(), **options)
    assert torch.equal(model.generate(**padded_batch(), **options), want)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and any("input_ids are on cpu" in reason for reason in call.not_looped)
