"""Bounds of the captured decode steps, and what failures leave behind; without a GPU, as `test_forward_graphs.py`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import forward_graphs
from hf_fastattn.graphs.fingerprint import UNCACHED, fingerprint_of, why_not_capturable
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.graphs.recorded_forward import no_garbage_collection
from hf_fastattn.transformers_version import CACHE
from tests.graphs.test_forward_graphs import graphs, replays, run
from tests.tools.models import assert_fast, padded_batch, pair_with_graphs, patch_with_graphs, single, tiny
from tests.tools.reexecuted import ReexecutedStep, reexecuted


@pytest.fixture(autouse=True)
def without_a_gpu() -> Iterator[None]:
    with reexecuted():
        yield


def test_the_least_recently_used_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "MAX_GRAPHS", 3)
    monkeypatch.setattr(forward_graphs, "MAX_EXTENDS", 0)
    stock, model = pair_with_graphs("llama")
    for rows in (1, 2, 3, 4, 2, 1):
        batch = padded_batch(rows)
        assert torch.equal(run(model, 8, **batch), run(stock, 8, **batch))
        assert len(graphs(model)) <= 3
    # Rows 2 were still there, rows 1 had been dropped.
    assert replays(model) == (1, 7)


def test_graphs_go_with_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", 0)
    model = patch_with_graphs(tiny("llama"))
    ids = single()["input_ids"]
    with torch.no_grad():
        cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig())
        model(ids, **{CACHE: cache})
        for column in range(3):
            model(ids[:, column : column + 1], **{CACHE: cache})
    assert len(graphs(model)) == 1
    del cache
    gc.collect()
    assert len(graphs(model)) == 0
    model.train()
    with torch.no_grad():
        run(model, 8)
    assert replays(model)[1] > 0 and len(graphs(model)) == 0


@pytest.mark.parametrize("when", ["first run", "recording", "pages"])
def test_a_failed_capture(when: str) -> None:
    class Failing(ReexecutedStep):
        def capture(self, run: Any, warmed_up: Any) -> None:
            if when == "first run":
                raise torch.OutOfMemoryError("no memory left")
            run()
            if when == "recording":
                run()
                raise RuntimeError("operation not permitted when stream is capturing")

    stock, model = pair_with_graphs("llama")
    want = run(stock)
    # Undone before what the fixture has patched.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardGraphs, "forward_type", Failing)
        for tries in range(5):
            assert torch.equal(run(model), want)
            call = assert_fast(model)
            # Once a call, and a few calls at most.
            assert call.graphs_replayed == 0 and sum(call.uncaptured.values()) == int(tries < forward_graphs.MAX_FAILURES)
    noise = model.model.norm.weight.data.clone()
    model.model.norm.weight.data = noise
    assert torch.equal(run(model), want) and replays(model)[1] > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_exceptions_of_a_streamer(error: type[BaseException], step: int) -> None:
    class Streamer:
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count > step:
                raise error("inside")

        def end(self) -> None:
            """Nothing to do."""

    stock, model = pair_with_graphs("qwen2_window")
    with pytest.raises(error, match="inside"):
        run(model, streamer=Streamer(), **single())
    assert hf_fastattn.report(model).pages_in_use == 0
    assert torch.equal(run(model), run(stock))
    assert replays(model)[1] > 0


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_step_leaves_the_cache_as_it_was(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair_with_graphs("llama")
    cache, ids = hf_fastattn.PagedCache(model.config), single()["input_ids"]
    with torch.no_grad():
        want = stock(ids).logits[:, -8:]
        parts = []
        model(ids[:, :-8], **{CACHE: cache})
        for column in range(8):
            token = ids[:, column - 8][:, None]
            if column == step:
                with monkeypatch.context() as patch:
                    target = model.model.layers[1].mlp
                    patch.setattr(type(target), "forward", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        model(token, **{CACHE: cache})
                assert cache.get_seq_length() == ids.shape[1] - 8 + column
            parts.append(model(token, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-3, rtol=1e-4)
    assert replays(model)[1] > 0


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def test_two_models_at_once() -> None:
    stocks, models = zip(*(pair_with_graphs("llama", seed=seed) for seed in (0, 1)), strict=True)
    for _ in range(2):
        for stock, model in zip(stocks, models, strict=True):
            assert torch.equal(run(model, 12), run(stock, 12))
    assert all(replays(model) == (0, 11) for model in models)


def test_inference_mode_then_no_grad() -> None:
    stock, model = pair_with_graphs("llama")
    want = run(stock, 12)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(run(model, 12), want)
            assert replays(model)[1] > 0


def test_unpatch_drops_them() -> None:
    model = patch_with_graphs(tiny("llama"))
    run(model, 8)
    held = [entry.inputs for entry in graphs(model)._entries.values()]
    assert len(held) == 1
    hf_fastattn.unpatch(model)
    gc.collect()
    assert len(gc.get_referrers(held[0])) == 1


def test_garbage_collection_is_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), no_garbage_collection():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_shows_in_the_state_of_a_decoder() -> None:
    """A reason is asked for only when this changed: all that a reason may come from has to show."""
    model = tiny("llama").model
    linear = model.layers[1].mlp.up_proj
    linear._compiled_call_impl = None
    device = torch.device("cpu")
    before = fingerprint_of(model, device)
    assert fingerprint_of(model, device) == before and not before.hooked
    for change in (
        lambda: setattr(linear, "_compiled_call_impl", print),
        lambda: setattr(linear, "forward", print),
        lambda: setattr(linear, "_hf_hook", print),
        lambda: setattr(linear, "weight", torch.nn.Parameter(linear.weight[:, :32])),
        lambda: linear.train(not linear.training),
        lambda: setattr(model, "gradient_checkpointing", True),
    ):
        change()
        after = fingerprint_of(model, device)
        assert after.parts != before.parts
        before = after
    handle = linear.register_forward_hook(lambda *given: None)
    assert fingerprint_of(model, device) == before._replace(hooked=True)
    handle.remove()
    assert fingerprint_of(model, device) == before


def test_nothing_is_recorded_where_pytorch_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture would fail there, and the failure would end the process."""
    decoder, device = tiny("llama").model, torch.device("cuda", 0)
    monkeypatch.setenv(UNCACHED, "1")
    assert why_not_capturable(decoder, device) == f"{UNCACHED} is set"
    monkeypatch.delenv(UNCACHED)
    assert UNCACHED not in str(why_not_capturable(decoder, device))
