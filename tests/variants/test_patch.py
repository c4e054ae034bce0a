"""A patched model and its variant: by layer, patched again, taken back, copied; what it reports, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import hf_fastattn
from hf_fastattn import StockAttentionError, Variant
from hf_fastattn.cache.batch import Batch
from hf_fastattn.transformers_version import CACHE
from tests.patches.snapshots import assert_plain
from tests.tools.models import assert_fast, padded_batch, single, tiny
from tests.tools.reexecuted import ReadBack, reexecuted_loop
from tests.tools.variant_models import CASES, DISTANCES, by_row, patched_with, stock_with

ASKED: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
ALIBI, WINDOW = CASES["alibi"].make(), CASES["window"].make()


def generate(model: Any, **options: Any) -> Tensor:
    return model.generate(**{**padded_batch(), **ASKED, **options})


def test_by_layer() -> None:
    asked: list[int] = []

    def by_layer(index: int) -> Variant | None:
        asked.append(index)
        return {0: ALIBI, 2: WINDOW}.get(index)

    model = hf_fastattn.patch(tiny("llama"), variant=by_layer)
    assert asked == [0, 1, 2]
    assert hf_fastattn.report(model).variants == ("layer 0: score_mod=alibi", "layer 2: window=20")
    assert "variant       layer 2: window=20" in str(hf_fastattn.report(model))
    stock = tiny("llama")
    for index, name in ((0, "alibi"), (2, "window")):
        stock.model.layers[index].self_attn.config = stock_with(name).config
    assert torch.equal(generate(model), generate(stock)) and not torch.equal(generate(model), generate(tiny("llama")))
    assert_fast(model)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "mixtral", "ministral3", "qwen2_vl", "smollm3"])
def test_other_families(family: str) -> None:
    stock, model = stock_with("alibi", family=family), patched_with("alibi", family=family)
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model)


@pytest.mark.parametrize("family", ["qwen2_window", "mistral_window"])
def test_windows_of_the_model_go_with_the_variants(family: str) -> None:
    stock, model, ids = stock_with("alibi", family=family), patched_with("alibi", family=family), single(60)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-4, rtol=1e-4)
        assert (
            model(ids).logits
            - patched_with("alibi", family=family, use_sliding_window=False, sliding_window=None)(ids).logits
        ).abs().max() > 0.1


def test_patched_again() -> None:
    model = hf_fastattn.patch(tiny("llama"), variant=ALIBI)
    state = vars(model)["_fastattn"]
    for same in (ALIBI, CASES["alibi"].make(), lambda index: ALIBI):
        assert hf_fastattn.patch(model, variant=same) is model and vars(model)["_fastattn"] is state
    for other in (None, WINDOW, Variant(score_mod=ALIBI.score_mod, window=20), lambda index: ALIBI if index else None):
        with pytest.raises(ValueError, match="with another variant"):
            hf_fastattn.patch(model, variant=other)
    with pytest.raises(ValueError, match="with another variant"):
        hf_fastattn.patch(hf_fastattn.patch(tiny("llama")), variant=ALIBI)
    assert torch.equal(generate(model), generate(stock_with("alibi")))


def test_two_models_and_back() -> None:
    alibi, window = patched_with("alibi"), patched_with("window")
    for _ in range(2):
        assert torch.equal(generate(alibi), generate(stock_with("alibi")))
        assert torch.equal(generate(window), generate(stock_with("window")))
    hf_fastattn.unpatch(alibi)
    assert_plain(alibi, "llama")
    assert torch.equal(generate(alibi), generate(tiny("llama")))
    hf_fastattn.patch(alibi)
    assert torch.equal(generate(alibi), generate(tiny("llama"))) and hf_fastattn.report(alibi).variants == ()
    assert torch.equal(generate(window), generate(stock_with("window")))
    with hf_fastattn.patched(hf_fastattn.unpatch(alibi), variant=WINDOW):
        assert torch.equal(generate(alibi), generate(window))
    assert_plain(alibi, "llama")


def test_copies_are_plain() -> None:
    # A function within a function cannot be pickled.
    model = hf_fastattn.patch(tiny("llama"), variant=Variant(score_mod=lambda s, b, h, q, k: s - (q - k) * 0.5))
    tokens = generate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert_plain(twin, "llama")
        assert torch.equal(generate(twin), generate(tiny("llama")))
    assert torch.equal(generate(model), tokens)


def test_forwards_without_a_cache_of_ours() -> None:
    stock, model, ids = stock_with("distance bias"), patched_with("distance bias"), single()["input_ids"]
    with torch.no_grad():
        want = stock(ids, labels=ids)
        kept, unkept = model(ids, labels=ids), model(ids, labels=ids, use_cache=False)
        more = model(ids[:, :3], **{CACHE: kept[CACHE]}).logits
        tuples = model(ids, return_dict=False, use_cache=False)
        torch.testing.assert_close(kept.logits, want.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.loss, want.loss, atol=1e-4, rtol=1e-4)
        assert torch.equal(unkept.logits, kept.logits) and getattr(unkept, CACHE) is None and len(tuples) == 1
        torch.testing.assert_close(more, stock(ids[:, :3], **{CACHE: want[CACHE]}).logits, atol=1e-4, rtol=1e-4)
    masked = padded_batch()
    with torch.no_grad():
        got, want = model(**masked).logits, stock(**masked).logits
    shown = masked["attention_mask"].bool()
    torch.testing.assert_close(got[shown], want[shown], atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[Any, str]] = {
    "static cache": (lambda model: generate(model, cache_implementation="offloaded"), "cache_implementation"),
    "no cache": (lambda model: generate(model, use_cache=False), "use_cache=False"),
    "gradients": (lambda model: model(**padded_batch()), "gradients are needed"),
    "a 4-D mask": (
        lambda model: no_grad(model, single(5)["input_ids"], attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool)),
        "custom attention mask",
    ),
    "weights": (lambda model: no_grad(model, single(5)["input_ids"], output_attentions=True), "attention weights"),
    "an empty cache": (
        lambda model: no_grad(model, single(5)["input_ids"], **{CACHE: DynamicCache()}),
        "DynamicCache",
    ),
    "bidirectional": (lambda model: no_grad(model, single(5)["input_ids"], is_causal=False), "is_causal=False"),
    "attention itself": (
        lambda model: model.model.layers[1].self_attn(
            torch.zeros(1, 3, 64), position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)), attention_mask=None
        ),
        "no forward over pages",
    ),
}


def no_grad(model: Any, *args: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(*args, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_stocks_attention_would_do_is_refused(name: str) -> None:
    call, words = REFUSED[name]
    model = patched_with("alibi")
    model.set_attn_implementation("eager")
    want = generate(model)
    with pytest.raises(StockAttentionError, match=words) as error:
        call(model)
    assert "score_mod=alibi" in str(error.value) and "unpatch()" in str(error.value)
    assert torch.equal(generate(model), want)
    assert_fast(model)


def test_a_model_without_variants_falls_back_as_before() -> None:
    model = hf_fastattn.patch(tiny("llama"), variant=lambda index: None)
    assert torch.equal(generate(model, use_cache=False), generate(tiny("llama"), use_cache=False))
    assert hf_fastattn.report(model).last_call.fallbacks


def test_a_busy_model_is_an_error() -> None:
    model, raised = patched_with("alibi"), []

    class Meanwhile(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            return scores

    def call() -> None:
        try:
            generate(model)
        except StockAttentionError as error:
            raised.append(str(error))

    tokens = generate(model, logits_processor=LogitsProcessorList([Meanwhile()]), max_new_tokens=2)
    assert len(raised) == 2 and "busy in another thread" in raised[0]
    assert torch.equal(generate(model, max_new_tokens=2), tokens)
    assert_fast(model)


def test_a_compiled_model() -> None:
    model, ids = patched_with("alibi"), single()["input_ids"]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        want = stock_with("alibi")(ids).logits
        torch.testing.assert_close(compiled(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(generate(compiled), generate(stock_with("alibi")))


def test_what_is_trained_needs_gradients() -> None:
    table = torch.nn.Parameter(DISTANCES.clone())
    model = hf_fastattn.patch(
        tiny("llama").requires_grad_(False), variant=Variant(score_mod=lambda s, b, h, q, k: s + table[h, q - k])
    )
    with pytest.raises(StockAttentionError, match="gradients are needed"):
        model(single()["input_ids"])
    assert torch.equal(generate(model), generate(stock_with("distance bias")))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def learned(table: Tensor, device: str) -> Any:
    """A patched model whose variant reads `table`."""
    variant = Variant(score_mod=lambda s, b, h, q, k: s + table[h, q - k])
    return hf_fastattn.patch(tiny("llama").to(device), variant=variant)


def generate_on(model: Any) -> Tensor:
    batch = {name: value.to(model.device) for name, value in padded_batch().items()}
    return model.generate(**batch, **ASKED).cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_are_read_at_every_step(device: str) -> None:
    with reexecuted_loop() if device == "cpu" else contextlib.nullcontext():
        table = DISTANCES.clone().to(device)
        model = learned(table, device)
        assert torch.equal(generate_on(model), generate(stock_with("distance bias")))
        table.zero_()
        assert torch.equal(generate_on(model), generate(tiny("llama")))
        call = assert_fast(model)
        # The same recorded step serves.
        assert call.fast_loops == 1 and call.graphs_replayed > 0 and not call.graphs_captured


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_recorded_anew_where_what_is_read_lies_elsewhere(device: str) -> None:
    with reexecuted_loop() if device == "cpu" else contextlib.nullcontext():
        table = torch.nn.Parameter(DISTANCES.clone().to(device), requires_grad=False)
        model = learned(table, device)
        generate_on(model)
        generate_on(model)
        assert not assert_fast(model).graphs_captured
        for other in (torch.zeros_like(table), torch.zeros_like(table).double()):
            table.data = other
            assert torch.equal(generate_on(model), generate(tiny("llama")))
            assert assert_fast(model).graphs_captured


FACTOR = 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_names_that_stand_for_something_else_are_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with reexecuted_loop() if device == "cpu" else contextlib.nullcontext():
        table = torch.zeros_like(DISTANCES).to(device)

        def added(h: Tensor, distance: Tensor) -> Tensor:
            return table[h, distance] * FACTOR

        variant = Variant(score_mod=lambda s, b, h, q, k: s + added(h, q - k))
        model = hf_fastattn.patch(tiny("llama").to(device), variant=variant)
        plain, changed = generate(tiny("llama")), generate(stock_with("distance bias"))
        assert torch.equal(generate_on(model), plain)
        monkeypatch.setitem(globals(), "FACTOR", 1.0)
        assert torch.equal(generate_on(model), plain)
        assert assert_fast(model).graphs_captured
        table = DISTANCES.to(device)
        assert torch.equal(generate_on(model), changed)
        assert assert_fast(model).graphs_captured
        assert torch.equal(generate_on(model), changed)
        assert not assert_fast(model).graphs_captured


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads() -> None:
    model = learned(DISTANCES.clone().to("cuda"), "cuda")
    want = generate_on(model)
    filled = [torch.full_like(DISTANCES, 9.0, device="cuda") for _ in range(64)]
    assert torch.equal(generate_on(model), want) and filled


@pytest.mark.gpu
def test_a_model_that_moves() -> None:
    table = torch.nn.Parameter(DISTANCES.clone(), requires_grad=False)
    model = learned(table, "cpu")
    want = generate(model)
    with pytest.raises(hf_fastattn.VariantError, match="on cpu, but attention runs on cuda"):
        generate_on(model.to("cuda"))
    table.data = table.data.to("cuda")
    assert torch.equal(generate_on(model), want)
    assert hf_fastattn.report(model).backend != "reference"


def test_reading_the_row_is_reported() -> None:
    model = hf_fastattn.patch(tiny("llama"), variant=Variant(score_mod=by_row))
    assert hf_fastattn.report(model).variants == (
        "layers 0 to 2: score_mod=by_row, reads the row, so that nothing is shared between rows",
    )
    generate(model, num_return_sequences=2, do_sample=True, top_k=1)
    call = hf_fastattn.report(model).last_call
    assert call is not None and not call.pages_shared
    assert list(call.fallbacks) == ["equal rows are computed one by one: an attention variant reads the row"]


PATHS = {
    "prompts": lambda batch: not batch.is_decode,
    "steps": lambda batch: batch.is_decode,
    "static": lambda batch: batch.host is None,
    "made by the host": lambda batch: batch.host is not None,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["alibi", "documents", "softcap and sinks", "transforms"])
def test_a_variant_that_is_left_out_somewhere_is_noticed(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = generate(stock_with(name))
    for kind in (Batch, ReadBack):
        attend = kind.attend

        def faulty(self: Batch, *args: Any, attend: Any = attend, variant: Any = None, **options: Any) -> Tensor:
            return attend(self, *args, variant=None if PATHS[path](self) else variant, **options)

        monkeypatch.setattr(kind, "attend", faulty)
    with contextlib.nullcontext() if path == "made by the host" else reexecuted_loop():
        assert not torch.equal(generate(patched_with(name)), want)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["distance bias", "first keys and a window", "transforms"])
def test_in_the_kernels(name: str) -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1}
    stock, model = stock_with(name, **small), patched_with(name, **small)
    assert hf_fastattn.report(model).backend == "triton"
    asked: dict[str, Any] = {**padded_batch(2, 22), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**asked), stock.generate(**asked))
    assert_fast(model)
