"""RoPE's tables of a step by one launch, where the rotary embedding is of a form that is known; else by calling it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._contextlib import _DecoratorContextManager
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.kernels.attention import rope_reference
from hf_fastattn.patches.attention import rotary_forms
from hf_fastattn.patches.attention.rotary_forms import MATRIX_PRODUCT, frequencies_of
from hf_fastattn.transformers_version import CACHE
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.fused_layers import build
from tests.tools.models import VOCAB, assert_fast, padded_batch, pair, tiny

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "ministral", "smollm3")


class Asked(TorchDispatchMode):
    """How often PyTorch computed a cosine, or turned a sign."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tables += function in (torch.ops.aten.cos.default, torch.ops.aten.neg.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families(family: str) -> None:
    """To the bit what the model's own gives, by the same formula."""
    rotary = tiny(family).model.rotary_emb
    held = frequencies_of(rotary, CPU)
    assert held is not None
    states, position_ids = torch.zeros(3, 2, 8, dtype=torch.bfloat16), torch.tensor([[0, 1], [70, 900], [5, 31_000]])
    cos, sin, signed = rope_reference.tables(held.inv_freq, position_ids, held.factor, states.dtype)
    assert all(map(torch.equal, (cos, sin), rotary(states, position_ids=position_ids)))
    assert torch.equal(signed, rope_reference.signed_sin(sin))


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rotary = tiny("llama", rope_parameters=rope).model.rotary_emb
    held = frequencies_of(rotary, CPU)
    assert held is not None and (held.factor != 1.0) == (kind == "yarn")
    position_ids = torch.tensor([[3], [200]])
    want = rotary(torch.zeros(2, 1, 8), position_ids=position_ids)
    assert all(map(torch.equal, want, rope_reference.tables(*held[:1], position_ids, held.factor, torch.float32)))


def _wrapped(rotary: Any) -> None:
    """By a class that says of its forward that it is the one it wraps."""
    plain = type(rotary).forward

    @functools.wraps(plain)
    def later(self: Any, x: Any, position_ids: Any) -> Any:
        return plain(self, x, position_ids + 1)

    _with(rotary, forward=later)


def _own_forward(rotary: Any) -> None:
    rotary.forward = lambda x, position_ids: type(rotary).forward(rotary, x, position_ids + 1)


class Doubled(_DecoratorContextManager):
    """Frequencies are others in a block."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def clone(self) -> Any:
        return Doubled(self.rotary)

    def __enter__(self) -> None:
        self.rotary.inv_freq.mul_(2)

    def __exit__(self, *error: object) -> None:
        self.rotary.inv_freq.div_(2)


def _with(rotary: Any, **names: Any) -> None:
    """By a class with these names that says it is Transformers'."""
    kind = type(rotary)
    rotary.__class__ = type(kind.__name__, (kind,), {**names, "__module__": kind.__module__})


def _own_call(rotary: Any) -> None:
    def called(self: Any, x: Any, position_ids: Any) -> Any:
        return torch.nn.Module.__call__(self, x, position_ids + 1)

    _with(rotary, __call__=called)


CHANGES: dict[str, Callable[[Any], object]] = {
    "class with a call of its own": _own_call,
    "in a block": lambda rotary: _with(rotary, forward=Doubled(rotary)(type(rotary).forward)),
    "frequencies of the class": lambda rotary: _with(rotary, inv_freq=property(lambda self: torch.ones(8))),
    "frequencies that hide the buffer": lambda rotary: vars(rotary).update(inv_freq=torch.ones(8)),
    "factor of another kind": lambda rotary: setattr(rotary, "attention_scaling", np.float64(2.0)),
    "wrapped class": _wrapped,
    "own forward": _own_forward,
    "hook": lambda rotary: rotary.register_forward_hook(lambda module, args, output: None),
    "frequencies of 64 bits": lambda rotary: rotary.double(),
    "frequencies elsewhere": lambda rotary: rotary.to("meta"),
    "frequencies in two dimensions": lambda rotary: rotary.register_buffer("inv_freq", torch.ones(2, 4)),
    "no frequencies": lambda rotary: rotary.register_buffer("inv_freq", None),
    "frequencies by length": lambda rotary: setattr(rotary, "rope_type", "dynamic"),
    "a factor for each": lambda rotary: setattr(rotary, "attention_scaling", torch.ones(8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_unknown(change: str) -> None:
    rotary = tiny("llama").model.rotary_emb
    assert frequencies_of(rotary, CPU) is not None
    CHANGES[change](rotary)
    assert frequencies_of(rotary, CPU) is None


def test_what_is_no_module() -> None:
    plain = type(tiny("llama").model.rotary_emb).forward
    assert frequencies_of(lambda x, position_ids: (x, x), CPU) is None
    assert frequencies_of(type("Own", (), {"forward": plain})(), CPU) is None


def test_other_code_in_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As editors do that reload modules; and where its source is read, the file may hold another version by then."""
    rotary = tiny("llama").model.rotary_emb
    function: Any = inspect.unwrap(type(rotary).forward)
    assert frequencies_of(rotary, CPU) is not None

    def forward(self: Any, x: Any, position_ids: Any) -> Any:
        return torch.cos(x + position_ids), x

    was = function.__code__
    with monkeypatch.context() as patch:
        places = {"co_filename": was.co_filename, "co_firstlineno": was.co_firstlineno}
        patch.setattr(function, "__code__", forward.__code__.replace(**places))
        assert inspect.getsource(function) == inspect.getsource(was) and frequencies_of(rotary, CPU) is None
    monkeypatch.setattr(linecache, "getlines", lambda *_: ["x = 1"])
    assert frequencies_of(rotary, CPU) is not None


def test_another_form() -> None:
    """OLMo's cos and sin stay fp32."""
    assert frequencies_of(tiny("olmo2").model.rotary_emb, CPU) is None


def test_matrix_products_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = tiny("llama").model.rotary_emb
    monkeypatch.setattr(rotary_forms, "_multiplies_in_tf32", lambda: True)
    by_matrix = rotary_forms._is_matrix_product(type(rotary).forward)
    assert (frequencies_of(rotary, CPU) is None) == by_matrix
    monkeypatch.setattr(rotary_forms, "_is_matrix_product", lambda _: True)
    assert frequencies_of(rotary, CPU) is None
    assert "@" in MATRIX_PRODUCT


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the positions of each launch."""
    from hf_fastattn.kernels.attention import rope_tables as module

    seen, original = list[tuple[int, ...]](), module.rope_tables

    def run(frequencies: Any, position_ids: Any, *rest: Any) -> Any:
        seen.append(tuple(position_ids.shape))
        return original(frequencies, position_ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "rope_tables", run)
        yield seen


@pytest.mark.interpreter
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("name", "rows"), [("llama", 3), ("qwen3", 1), ("smollm3", 2)])
def test_steps(name: str, rows: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt calls the rotary embedding; a step launches once for all layers, and gives what calling it gives."""
    model = hf_fastattn.patch(build(name))
    ids = torch.randint(1, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(rows))
    logits, positions = [], torch.full((rows, 1), 7)
    for asked in (True, False):
        cache = hf_fastattn.PagedCache(model.config)
        if not (asked and known):
            monkeypatch.setattr(rotary_forms, "_is_matrix_product", lambda _: None)
        with launches(monkeypatch) as seen, torch.no_grad():
            model(ids[:, :6], **{CACHE: cache}, use_cache=True)
            assert not seen
            # The first step of its size is rehearsed, and its tables forgotten.
            model(ids[:, 6:7], position_ids=positions - 1, **{CACHE: cache}, use_cache=True)
            seen.clear()
            with Asked() as mode:
                part = model(ids[:, 7:8], position_ids=positions, **{CACHE: cache}, use_cache=True)
                logits.append(part.logits)
            assert (seen, mode.tables) == (([(rows, 1)], 0) if asked and known else ([], 2))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [torch.int32, torch.int16, torch.uint8, torch.float32, "fractions"])
def test_positions_of_any_kind(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's positions may be numbers of any dtype: those that the launch does not take go to the module."""
    stock, model = pair("llama")
    positions = (
        torch.tensor([[17.5], [3.25], [200.0]]) if given == "fractions" else torch.tensor([[17], [3], [200]]).to(given)
    )
    ids, found = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1)), list[Any]()
    for side in (stock, model):
        with fused_in_torch(), launches(monkeypatch) as seen, torch.no_grad():
            cache = DynamicCache(config=side.config) if side is stock else hf_fastattn.PagedCache(side.config)
            side(ids[:, :7], **{CACHE: cache}, use_cache=True)
            found.append(side(ids[:, 7:], position_ids=positions, **{CACHE: cache}, use_cache=True).logits)
    assert len(seen) == (given is torch.int32)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["module", "function"])
def test_what_stands_where_the_module_was(call: str) -> None:
    """A function, or a module of the user's, is called in every step."""
    results = []
    for side in pair("llama"):
        held, decoder = side.model.rotary_emb, side.model
        del decoder.rotary_emb
        if call == "function":
            object.__setattr__(decoder, "rotary_emb", lambda x, position_ids, held=held: held(x, position_ids * 2))
        else:
            decoder.rotary_emb = Stretched(held)
        with fused_in_torch():
            results.append(side.generate(**padded_batch(), max_new_tokens=6, do_sample=False))
    assert torch.equal(*results)
    assert_fast(side, fallbacks=() if call == "function" else ("may look at the whole batch",))


class Stretched(torch.nn.Module):
    """A rotary embedding at twice the positions."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Any, position_ids: Any) -> Any:
        return self.held(x, position_ids * 2)


@pytest.mark.parametrize("place", ["attention", "layer"])
@pytest.mark.parametrize("how", ["sin", "cos", "both in place", "sin in place"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_hook_that_gives_a_layer_other_tables(place: str, how: str, fused: bool) -> None:
    """What is made of the tables once for all layers is made anew for that one; written in place, for those behind it."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        if "place" in how:
            sin.neg_()
            cos.mul_(0.5 if "both" in how else 1.0)
        else:
            kwargs["position_embeddings"] = (cos, -sin) if how == "sin" else (cos * 0.5, sin)
        return args, kwargs

    results: list[torch.Tensor] = []
    for side in pair("llama"):
        layer = side.model.layers[1]
        (layer if place == "layer" else layer.self_attn).register_forward_pre_hook(hook, with_kwargs=True)
        with fused_in_torch() if fused else contextlib.nullcontext():
            given = {**padded_batch(), "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
            results.append(torch.stack(side.generate(**given, output_logits=True).logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert_fast(side, fallbacks=("has hooks",))


@pytest.mark.interpreter
def test_batch_invariant_steps_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fastattn.patch(build("llama"), batch_invariant=True)
    monkeypatch.setattr("hf_fastattn.patches.fused.forward.calls_layers", lambda decoder: False)
    cache, ids = (
        hf_fastattn.PagedCache(model.config, FastAttnConfig(batch_invariant=True)),
        torch.ones(1, 5, dtype=torch.int64),
    )
    with launches(monkeypatch) as seen, torch.no_grad():
        model(ids, **{CACHE: cache}, use_cache=True)
        model(ids[:, :1], **{CACHE: cache}, use_cache=True)
    assert not seen
