"""Models of which something was compiled: ours runs as it was written, in recorded steps; without pages all is as it was."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import compile_regions
from transformers import CompileConfig

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.uncompiled import uncompiled
from hf_fastattn.wrappers import compiled_from
from tests.loop.test_decode_loop import assert_looped, run
from tests.patches.snapshots import snapshot
from tests.tools.fused_layers import build, count_launches, expected
from tests.tools.models import assert_fast, padded_batch, patch_with_graphs, single, tiny
from tests.tools.reexecuted import reexecuted_loop

NEW = 8


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param
    torch.compiler.reset()


class Backend:
    """Counts what it is asked to compile, and compiles nothing."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.asked += 1
        return module.forward


def forward_of_the_model(model: Any, backend: Any) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


def whole_graph(model: Any, backend: Any) -> None:
    """A break in it would be an error."""
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)


def the_model(model: Any, backend: Any) -> None:
    model.compile(backend=backend)


def wrapped(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def the_decoder(model: Any, backend: Any) -> None:
    model.model.compile(backend=backend)


def forward_of_the_decoder(model: Any, backend: Any) -> None:
    model.model.forward = torch.compile(model.model.forward, backend=backend)


def one_layer(model: Any, backend: Any) -> None:
    model.model.layers[0].compile(backend=backend)


def forwards_in_a_layer(model: Any, backend: Any) -> None:
    layer = model.model.layers[1]
    for module in (layer.self_attn, layer.mlp, layer.mlp.up_proj, layer.input_layernorm, layer.mlp.act_fn, model.lm_head):
        module.forward = torch.compile(module.forward, backend=backend)


def regions(model: Any, backend: Any) -> Any:
    return compile_regions(model, backend=backend)


def below_hooks(model: Any, backend: Any) -> None:
    forwards_in_a_layer(model, backend)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(model.device, io_same_device=True))


def applied(compiled: Callable[..., Any], model: Any, backend: Any) -> Any:
    made = compiled(model, backend)
    return model if made is None else made


COMPILED = [
    forward_of_the_model, whole_graph, the_model, wrapped, the_decoder, forward_of_the_decoder, one_layer,
    forwards_in_a_layer, regions, below_hooks,
]  # fmt: skip


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("compiled", COMPILED)
def test_tokens_and_undo(compiled: Callable[..., Any], patched_first: bool, device: str) -> None:
    stock, model, backend = tiny("qwen3").to(device), tiny("qwen3").to(device), Backend()
    if patched_first:
        patch_with_graphs(model)
    model = applied(compiled, model, backend)
    before = snapshot(model)
    patch_with_graphs(model)
    for _ in range(2):
        assert torch.equal(run(model, NEW), run(stock, NEW))
        assert_looped(model)
    assert backend.asked == 0
    # Transformers' own loop, over forwards of the model.
    assert torch.equal(run(model, NEW, num_beams=2), run(stock, NEW, num_beams=2))
    assert_fast(model)
    assert backend.asked == 0
    hf_fastattn.unpatch(model)
    assert patched_first or snapshot(model) == before
    # The compiler is slow.
    if compiled in (one_layer, forwards_in_a_layer):
        assert torch.equal(run(model, 2), run(stock, 2)) and backend.asked > 0


def test_compiled_attention_below_a_hook_that_goes() -> None:
    """What accelerate puts back is what it found."""
    model, backend = tiny("llama"), Backend()
    attention = model.model.layers[1].self_attn
    attention.forward = compiled = torch.compile(attention.forward, backend=backend)
    add_hook_to_module(attention, AlignDevicesHook())
    hf_fastattn.patch(model)
    remove_hook_from_submodules(model)
    assert torch.equal(run(model, NEW), run(tiny("llama"), NEW))
    assert_fast(model)
    hf_fastattn.unpatch(model)
    assert vars(attention)["forward"] is compiled


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.mlp.up_proj"])
def test_a_function_around_a_compiled_one(where: str, device: str) -> None:
    """`functools.wraps` gives it the attributes of what it wraps."""
    sides = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    before, seen = run(sides[0], NEW), []
    for side in sides:
        module = side.get_submodule(where)
        inner = torch.compile(module.forward, backend="eager")

        def louder(*args: Any, inner: Any = inner, side: Any = side, **kwargs: Any) -> Any:
            seen.append(side)
            out = inner(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                return 1.5 * out
            out.logits = out.logits.roll(1, -1)
            return out

        assert compiled_from(inner) is not None and compiled_from(functools.wraps(inner)(louder)) is None
        module.forward = functools.wraps(inner)(louder)
    stock, model = sides
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    assert sum(side is stock for side in seen) == sum(side is model for side in seen) == NEW
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and any("was replaced" in reason for reason in call.not_looped)


@pytest.mark.parametrize("options", [{}, {"disable_compile": True}, {"num_beams": 3}, {"max_cache_len": 200}])
def test_a_static_cache_is_asked_for(options: dict[str, Any], device: str) -> None:
    """Transformers compiles for it; pages hold as much, and the recorded steps need no compiler."""
    stock, model, backend = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device)), Backend()
    config = CompileConfig(backend=backend, fullgraph=False)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config, **options}
    want = run(stock, NEW, **{"cache_implementation": "static", **options, "disable_compile": True})
    assert torch.equal(run(model, NEW, **static), want)
    assert backend.asked == 0 and model._fastattn.runtime.counters.forwards > 0
    if "num_beams" not in options:
        assert_looped(model)
    assert_fast(model)


def test_a_static_cache_that_is_returned_stays(device: str) -> None:
    stock, model = tiny("llama").to(device), patch_with_graphs(tiny("llama").to(device))
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "disable_compile": True}
    want, ours = run(stock, NEW, **options), run(model, NEW, **options)
    assert torch.equal(ours.sequences, want.sequences) and type(ours[CACHE]) is type(want[CACHE])
    assert any("the cache is returned" in reason for reason in hf_fastattn.report(model).last_call.fallbacks)


def test_without_pages_it_is_compiled_as_ever() -> None:
    model, backend = tiny("llama"), Backend()
    hf_fastattn.patch(model)
    model.compile(backend=backend)
    with torch.no_grad():
        model(**padded_batch(2))
    assert backend.asked > 0
    torch.compiler.reset()


def test_two_threads_inside() -> None:
    """The stance is one for all threads: the last one out takes it back."""
    backend = Backend()
    twice = torch.compile(lambda x: 2 * x, backend=backend)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncompiled():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with uncompiled():
        thread.start()
        entered.wait()
    twice(torch.ones(2))
    assert backend.asked == 0
    leave.set()
    thread.join()
    twice(torch.ones(2))
    assert backend.asked == 1
    torch.compiler.reset()


@pytest.mark.interpreter
@pytest.mark.parametrize("compiled", [one_layer, forwards_in_a_layer, regions])
def test_layers_are_fused(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: Counter[str] = count_launches(monkeypatch)
    stock, model, backend = build("llama"), build("llama"), Backend()
    model = hf_fastattn.patch(applied(compiled, model, backend))
    options = {**single(3), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**options), stock.generate(**options))
    assert launched == Counter(expected(3)) + Counter({name: 2 * count for name, count in expected(1).items()})
    assert_fast(model)
    assert backend.asked == 0
