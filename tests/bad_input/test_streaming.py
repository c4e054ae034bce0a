"""Generation without end: what does not go with it is refused by name, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn import FastAttnConfig, PagedCache, Streaming, Variant
from hf_fastattn.kernels.variants.trace import VariantError
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import VOCAB, tiny

STREAM = Streaming(sinks=4, window=24, block=8)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sinks": -1}, ValueError, "sinks=-1"),
        ({"window": 0}, ValueError, "window=0"),
        ({"block": 0}, ValueError, "block=0"),
        ({"window": 1.5}, TypeError, "window=1.5"),
        ({"sinks": True}, TypeError, "sinks=True"),
    ],
)
def test_sizes(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Streaming(**fields)


def test_options() -> None:
    with pytest.raises(TypeError, match="streaming must be a hf_fastattn.Streaming or None, got 4"):
        FastAttnConfig(streaming=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="streaming and prefix_cache=True"):
        FastAttnConfig(streaming=STREAM, prefix_cache=True)
    with pytest.raises(ValueError, match="streaming and kv_dtype='int8'"):
        FastAttnConfig(streaming=STREAM, kv_dtype="int8")
    with pytest.raises(VariantError, match="rope='inside' with kv_dtype='int8'"):
        hf_fastattn.patch(tiny("llama"), variant=Variant(rope="inside"), kv_dtype="int8")
    with pytest.raises(ValueError, match="streaming and variant="):
        hf_fastattn.patch(tiny("llama"), variant=Variant(window=4), streaming=STREAM)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3_next", "layers of linear attention"),
        ("ministral", r"windows of their own \(\[24\]\)"),
        ("ministral3", "scales queries by their position"),
        ("qwen2_vl", "three axes"),
    ],
)
def test_models(family: str, message: str) -> None:
    model = tiny(family)
    with pytest.raises(ValueError, match=message):
        hf_fastattn.patch(model, streaming=STREAM)
    assert not hasattr(model, "_fastattn")


def test_positions_that_the_model_does_not_know() -> None:
    with pytest.raises(ValueError, match="a row keeps 1296 tokens, but the model knows 1024 positions"):
        hf_fastattn.patch(tiny("llama"), streaming=Streaming())


def prompt() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(1, VOCAB, (1, 50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "asks for beam search"),
        ({"num_beams": 2, "do_sample": True}, "asks for beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "asks for assisted generation"),
    ],
)
def test_calls(options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with hf_fastattn.patched(model, streaming=STREAM, page_size=4):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt(), max_new_tokens=8, **options)
        with pytest.raises(ValueError, match="generate_batch and streaming"):
            model.generate_batch([prompt()[0].tolist()])
        assert model._fastattn.runtime.groups.pages_in_use == 0
        assert model.generate(prompt(), max_new_tokens=8, do_sample=False).shape == (1, 58)


def test_caches() -> None:
    model = tiny("llama")
    with hf_fastattn.patched(model, streaming=STREAM, page_size=4), torch.no_grad():
        cache = PagedCache(model.config)
        model(prompt(), **{CACHE: cache})
        with pytest.raises(RuntimeError, match=r"crop\(\) needs all tokens of a row"):
            cache.crop(-1)
        with pytest.raises(RuntimeError, match="needs all tokens of a row"):
            hf_fastattn.truncate(cache, 3)
        with pytest.raises(RuntimeError, match="reading keys and values from the cache needs all tokens of a row"):
            _ = cache.layers[0].keys
        # A fork is one: it goes on by itself.
        other = hf_fastattn.fork(cache, [0, 0])
        again = model(prompt()[:, :1], **{CACHE: cache}).logits
        forks = model(prompt()[:, :1].repeat(2, 1), **{CACHE: other}).logits
        torch.testing.assert_close(forks, again.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="streaming=None, but the model is patched with streaming=Streaming"):
            model(prompt(), **{CACHE: PagedCache(model.config, FastAttnConfig())})
        with pytest.raises(ValueError, match="computed in pieces .* takes no output_hidden_states"):
            model(prompt(), output_hidden_states=True)
        cache.reset()
        other.reset()
        assert model._fastattn.runtime.groups.pages_in_use == 0


def test_a_piece_that_fails_leaves_an_empty_cache() -> None:
    model = tiny("llama")
    with hf_fastattn.patched(model, streaming=STREAM, page_size=4), torch.no_grad():
        cache, calls = PagedCache(model.config), []
        want = model(prompt()).logits
        layer = model.model.layers[1].mlp

        def fail(module: Any, given: Any) -> None:
            calls.append(given)
            if len(calls) == 3:
                raise RuntimeError("planted")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            model(prompt(), **{CACHE: cache})
        hook.remove()
        assert cache.get_seq_length() == 0 and model._fastattn.runtime.groups.pages_in_use == 0
        torch.testing.assert_close(model(prompt(), **{CACHE: cache}).logits, want)
