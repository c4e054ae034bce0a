"""Decode steps over static tensors: same tokens, dropped when what they depend on changes, bounded, and undone by failures.

Without a GPU nothing is recorded: a step runs again over its static tensors (`reexecuted`), which is all that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LogitsProcessorList

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.graphs import fingerprint, graph_store
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.pages import reach
from hf_fastattn.patches.modules.watched import takes_packed_rows
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import (
    CORE,
    FAMILIES,
    VOCAB,
    assert_fast,
    noisy,
    padded_batch,
    pair_with_graphs,
    patch_with_graphs,
    real_tokens,
    single,
    tiny,
)
from tests.tools.reexecuted import reexecuted

NEW = 40


@pytest.fixture(autouse=True)
def without_a_gpu() -> Iterator[None]:
    with reexecuted():
        yield


def run(model: Any, new: int = NEW, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**{**padded_batch(), "max_new_tokens": new, "do_sample": False, **kwargs})


def replays(model: Any) -> tuple[int, int]:
    """Graphs captured and replayed in the last call."""
    call = hf_fastattn.report(model).last_call
    return call.graphs_captured, call.graphs_replayed


def graphs(model: Any) -> ForwardGraphs:
    return model._fastattn.runtime.graphs


# One of each kind of cache and layer; rows that move do so below what sets other families apart.
SEVERAL_ROWS = (*CORE, "mistral_window", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock(family: str) -> None:
    stock, model = pair_with_graphs(family)
    calls: list[dict[str, Any]] = [{}]
    if family in SEVERAL_ROWS:
        calls += [{"num_beams": 3}, {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}]
    for kwargs in calls:
        assert torch.equal(run(model, 24, **kwargs), run(stock, 24, **kwargs)), kwargs
        call = assert_fast(model, real_tokens(padded_batch()))
        # The prompt, the first step of this shape, and then replays.
        assert (call.graphs_replayed, call.uncaptured) == (22, {})
        assert 1 <= call.graphs_captured <= 3


def test_a_second_call_captures_nothing() -> None:
    stock, model = pair_with_graphs("qwen2_window")
    want = run(stock)
    assert torch.equal(run(model), want) and replays(model) == (1, NEW - 2)
    for _ in range(2):
        assert torch.equal(run(model), want) and replays(model) == (0, NEW - 1)
    shorter = {"attention_mask": None, **single(9)}
    assert torch.equal(run(model, **shorter), run(stock, **shorter))
    assert replays(model) == (1, NEW - 2)


def test_off() -> None:
    stock, model = pair_with_graphs("llama", {"cuda_graphs": False})
    assert torch.equal(run(model), run(stock))
    assert replays(model) == (0, 0) and not assert_fast(model).uncaptured


def test_a_single_step_captures_nothing() -> None:
    model = patch_with_graphs(tiny("llama"))
    run(model, 2)
    assert replays(model) == (0, 0)


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_that_move_in_mid_generation(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    monkeypatch.setattr(reach, "AHEAD", 8)
    stock, model = pair_with_graphs("qwen2_window", {"page_size": page_size})
    # Without an end token there would be pages for all steps from the start.
    for kwargs in ({"eos_token_id": VOCAB - 1}, {"num_beams": 4, "do_sample": True, "eos_token_id": VOCAB - 1}):
        assert torch.equal(run(model, 50, **kwargs), run(stock, 50, **kwargs))
        captured, replayed = replays(model)
        assert captured > 1 and replayed == 48
        assert_fast(model, held=0)


def test_more_columns_than_the_table_had_room_for() -> None:
    stock, model = pair_with_graphs("llama", {"page_size": 1})
    cache, ids = hf_fastattn.PagedCache(model.config, model._fastattn.runtime.config), single(40)["input_ids"]
    with torch.no_grad():
        want = stock(torch.cat((ids, ids, ids), 1)).logits
        parts = [model(ids, **{CACHE: cache}).logits]
        for token in torch.cat((ids, ids), 1)[0]:
            parts.append(model(token.view(1, 1), **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-3, rtol=1e-4)
    # At 64 and again where the pages grew.
    assert replays(model)[0] >= 2 and replays(model)[1] == 79


@pytest.mark.parametrize("family", CORE)
def test_own_loop_with_embeddings_and_padding(family: str) -> None:
    stock, model = pair_with_graphs(family)
    batch, more = padded_batch(), torch.randint(1, VOCAB, (3, 12))
    cache, mask = hf_fastattn.PagedCache(model.config), batch["attention_mask"]
    past, embed = None, model.get_input_embeddings()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for ids in (batch["input_ids"], *more.split(1, 1)):
            if ids.shape[1] == 1:
                mask = torch.cat((mask, torch.ones_like(ids)), 1)
                positions = positions[:, -1:] + 1
            given = {"inputs_embeds": embed(ids), "attention_mask": mask, "position_ids": positions}
            want = stock(**given, **{CACHE: past}, use_cache=True)
            past = want[CACHE]
            ours = model(**given, **{CACHE: cache}, use_cache=True).logits
            torch.testing.assert_close(ours[:, -1], want.logits[:, -1], atol=1e-3, rtol=1e-4)
    assert replays(model) == (1, 11)


def test_outputs_stay_as_they_are() -> None:
    model = patch_with_graphs(tiny("llama"))
    cache, ids = hf_fastattn.PagedCache(model.config), single()["input_ids"]
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        hidden = [model.model(ids[:, i : i + 1], **{CACHE: cache}).last_hidden_state for i in range(6)]
        copies = [state.clone() for state in hidden]
        again = model.model(ids[:, :1], **{CACHE: cache}, return_dict=False)
    assert all(map(torch.equal, hidden, copies)) and len({state.data_ptr() for state in hidden}) == 6
    assert isinstance(again, tuple) and again[1] is cache
    assert replays(model)[1] == 6


# ---- what a captured step depends on ------------------------------------------------------------------------------


def test_weights_changed_in_place_are_seen() -> None:
    stock, model = pair_with_graphs("llama")
    run(model)
    for candidate in (stock, model):
        noisy(candidate, 0.05)
    assert torch.equal(run(model), run(stock))
    assert replays(model) == (0, NEW - 1)


def change_dtype(model: Any) -> None:
    model.to(torch.float64)


def change_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def change_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def change_number(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def change_buffer(model: Any) -> None:
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq * 0.5, persistent=False)


@pytest.mark.parametrize("change", [change_dtype, change_weight, change_module, change_number, change_buffer])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_changed_model_is_captured_anew(change: Any, by_hand: bool) -> None:
    stock, model = pair_with_graphs("llama")
    before = run(model, 16)
    for candidate in (stock, model):
        change(candidate)
    want = run(stock, 16)
    assert change is change_dtype or not torch.equal(want, before)
    if not by_hand:
        assert torch.equal(run(model, 16), want)
        captured, replayed = replays(model)
        assert captured == 1 and replayed >= 14
        return
    cache, mask = hf_fastattn.PagedCache(model.config), padded_batch()["attention_mask"]
    with torch.no_grad():
        for step in range(16):
            ids = want[:, : mask.shape[1]] if step == 0 else want[:, mask.shape[1] - 1 : mask.shape[1]]
            logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
            assert torch.equal(logits[:, -1].argmax(-1), want[:, mask.shape[1]])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def lora(model: Any) -> Any:
    torch.manual_seed(4)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    peft = get_peft_model(model, LoraConfig(**options), "first")
    peft.add_adapter("second", LoraConfig(**options, lora_alpha=32))
    return peft


def test_adapters() -> None:
    stock, model = (lora(tiny("llama")) for _ in range(2))
    patch_with_graphs(model)
    outputs = []

    def check(captured: int | None, **options: Any) -> None:
        want = run(stock, 16, **options)
        assert torch.equal(run(model, 16, **options), want)
        outputs.append(want)
        assert replays(model)[0] == captured and replays(model)[1] > 0

    check(1)
    check(0)
    for peft in (stock, model):
        peft.set_adapter("second")
    check(1)
    for peft in (stock, model):
        for module in peft.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["second"] *= 0.25
    check(1)
    with stock.disable_adapter(), model.disable_adapter():
        check(1)
    check(1)
    for peft in (stock, model):
        peft.merge_adapter()
    check(1)
    # A forward takes the adapter out of the weights; a user's own processor has the model compared before each.
    with stock.disable_adapter(), model.disable_adapter():
        check(1, logits_processor=LogitsProcessorList([lambda ids, scores: scores]))
    different = [outputs[0], *outputs[2:5]]
    assert len({tuple(tokens.flatten().tolist()) for tokens in different}) == 4


@pytest.mark.parametrize("where", ["layers.1.mlp", "layers.2.self_attn.q_proj", "norm"])
def test_hooks_are_called(where: str) -> None:
    stock, model = pair_with_graphs("llama")
    run(model, 8)
    calls = []
    for candidate in (stock, model):
        module = candidate.model.get_submodule(where)
        handle = module.register_forward_hook(
            takes_packed_rows(lambda module, args, output: calls.append(1) or output * 1.01)
        )
    assert torch.equal(run(model, 8), run(stock, 8))
    assert len(calls) == 2 * 8 and replays(model) == (0, 0)
    assert "has hooks" in next(iter(assert_fast(model).uncaptured))
    handle.remove()
    run(model, 8)
    assert replays(model)[1] > 0


def test_what_is_launched_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    stock, model = pair_with_graphs("llama")
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    want, ours = run(stock, 8, **options), run(model, 8, **options)
    for theirs, mine in zip(want.hidden_states, ours.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1][:, -1], theirs[-1][:, -1], atol=1e-3, rtol=1e-4)
    assert assert_fast(model, held=None).uncaptured == {"output_hidden_states is given": 7}
    run(model, 8, **options)
    assert caplog.text.count("output_hidden_states is given") == 1
    del want, ours
    # Transformers leaves its hooks behind; they do nothing.
    assert torch.equal(run(model, 8), run(stock, 8)) and replays(model)[1] > 0


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}],
)
def test_rope_whose_frequencies_depend_on_the_length(rope: dict[str, Any]) -> None:
    over = {"rope_parameters": {**rope, "rope_theta": 10000.0}, "max_position_embeddings": 48}
    stock, model = pair_with_graphs("llama", **over)
    assert torch.equal(run(model), run(stock))
    assert (replays(model)[1] > 0) == (rope["rope_type"] != "dynamic")


@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_steps_without_positions(family: str) -> None:
    """A loop by hand that leaves them to the cache: they follow what was there before the step, at a capture too."""
    stock, model = pair_with_graphs(family)
    ids, logits = single(12)["input_ids"], []
    for side in (stock, model):
        cache: Any = DynamicCache(config=stock.config) if side is stock else hf_fastattn.PagedCache(model.config)
        with torch.no_grad():
            side(input_ids=ids, **{CACHE: cache})
            logits.append([side(input_ids=ids[:, step : step + 1], **{CACHE: cache}).logits for step in range(10)])
    torch.testing.assert_close(torch.cat(logits[1], 1), torch.cat(logits[0], 1), rtol=1e-3, atol=1e-3)
    assert len(graphs(model)._entries) == 1


def test_unknown_modules_are_called() -> None:
    class Counting(torch.nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x)

    model = patch_with_graphs(tiny("llama"))
    model.model.layers[0].mlp.up_proj.__class__ = Counting
    run(model, 8)
    assert Counting.calls == 8 and replays(model) == (0, 0)


def test_early_exit_of_the_same_model() -> None:
    stock, model = pair_with_graphs("llama")
    options = {"assistant_early_exit": 1, **single()}
    assert torch.equal(run(model, **options), run(stock, **options))
    assert replays(model)[1] > 0


def test_masks_are_read_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `generate()` appends to its mask is known: the host need not wait for the device to see it."""
    read = []
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and args[0] == "cpu":
            read.append(self.shape)
        return original(self, *args, **kwargs)

    for family in CORE:
        stock, model = pair_with_graphs(family)
        for kwargs in ({}, {"num_beams": 3}):
            want = run(stock, 16, **kwargs)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "to", to)
                ours = run(model, 16, **kwargs)
            assert torch.equal(ours, want)
            # That of the prompt, and with rows that share one the first that is as wide as the batch; and once the prompt's
            # tokens with their mask and positions, to see which rows begin alike.
            assert len(read) <= 3, read
            read.clear()


@pytest.mark.interpreter
def test_the_kernels_over_static_tensors() -> None:
    stock, model = pair_with_graphs("qwen2_window", {"backend": "triton", "page_size": 4}, num_hidden_layers=2)
    batch = padded_batch(2, 12)
    assert torch.equal(run(model, 5, **batch), run(stock, 5, **batch))
    assert replays(model) == (1, 3)


def test_without_a_gpu_nothing_is_captured() -> None:
    model = patch_with_graphs(tiny("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardGraphs, "forward_type", RecordedForward)
        run(model, 8)
    assert replays(model) == (0, 0) and not assert_fast(model).uncaptured


def test_a_fingerprint_that_is_known_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, other, device = tiny("llama").model, tiny("llama").model, torch.device("cpu")
    graphs, taken = ForwardGraphs(True), list[Any]()

    def counted(module: Any, place: torch.device) -> Any:
        taken.append(module)
        return fingerprint_of(module, place)

    monkeypatch.setattr(graph_store, "fingerprint_of", counted)
    with graphs.knowing(decoder, device, fingerprint_of(decoder, device)):
        graphs.compare(decoder, device)
        assert taken == [] and graphs.compare(decoder, device)
        # Of another module, or under autocast, nothing is known.
        assert not graphs.compare(other, device)
        with torch.autocast("cpu", torch.bfloat16):
            assert not graphs.compare(decoder, device)
    assert len(taken) == 2
    decoder.layers[0].mlp.up_proj.weight = torch.nn.Parameter(decoder.layers[0].mlp.up_proj.weight.clone())
    assert not graphs.compare(decoder, device) and len(taken) == 3


def test_a_hit_takes_a_fingerprint_only_of_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    take = fingerprint._fingerprint
    monkeypatch.setattr(fingerprint, "_fingerprint", lambda module, *given: (taken.append(module), take(module, *given))[1])
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    ids = torch.randint(1, 90, (1, 70), generator=torch.Generator().manual_seed(1))
    asked = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with reexecuted():
        for _ in range(4):
            taken.clear()
            model.generate(ids, **asked)
        call = hf_fastattn.report(model).last_call
        assert call is not None and call.tokens_reused == 69 and call.graphs_replayed == 1
        assert not taken
        model.model.norm.variance_epsilon *= 2
        model.generate(ids, **asked)
        # Without a GPU a look at what would be replayed takes one more.
        assert set(taken) == {model.model} and not hf_fastattn.report(model).last_call.tokens_reused
