"""A model whose layers are on several devices, as `device_map="balanced"` places them: fused on each, steps recorded.

Without GPUs the devices are one processor by two names (`spread`), and steps run again over their static tensors.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import send_to_device

import hf_fastattn
from hf_fastattn.graphs.placement import SEVERAL, route_of
from hf_fastattn.graphs.rotary_copies import RotaryCopies
from hf_fastattn.loop.loop_graphs import LoopGraphs
from tests.kernels.cases import assert_close
from tests.loop.test_decode_loop import ENDS, Collect, assert_looped, run
from tests.patches.snapshots import lora, snapshot
from tests.tools.fused_layers import assert_fused, build, count_launches
from tests.tools.models import assert_fast, padded_batch, patch_with_graphs, single, tiny
from tests.tools.reexecuted import ReadBack, reexecuted_loop
from tests.tools.spread import spread

NEW = 12


@pytest.fixture(params=["cpu", pytest.param("gpus", marks=pytest.mark.gpu)])
def gpus(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param == "gpus" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param == "gpus"


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """To which devices steps have sent hidden states."""
    found: Counter[str] = Counter()
    send = LoopGraphs.send

    def counted(self: LoopGraphs, states: Any, place: torch.device) -> Any:
        found[str(place)] += 1
        return send(self, states, place)

    monkeypatch.setattr(LoopGraphs, "send", counted)
    return found


def both(family: str = "llama", gpus: bool = False, over: dict[str, Any] | None = None, **places: Any) -> tuple[Any, Any]:
    """(stock model, patched model), both on two devices."""
    stock, model = (spread(tiny(family, **(over or {})), gpus=gpus, **places) for _ in range(2))
    return stock, patch_with_graphs(model)


WAYS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "rotary first": {"rotary": False},
    "head first": {"head": False},
    "all but the embedding": {"cut": 0},
    "the norm alone": {"cut": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens(way: str, gpus: bool, crossed: Counter[str]) -> None:
    stock, model = both("qwen3", gpus, **WAYS[way])
    want = run(stock, NEW)
    crossed.clear()
    for _ in range(2):
        assert torch.equal(run(model, NEW), want)
        call = assert_looped(model)
        assert call.forwards == NEW
    if not gpus:
        # Each way as often, and once more for a step that warms up.
        back = 1 if way == "head first" else 0
        assert crossed == {"cpu:0": 2 * NEW - 1, **({"cpu": 2 * NEW - 1} if back else {})}


@pytest.mark.parametrize("family", ["qwen2_window", "mistral_window", "qwen2", "ministral3"])
def test_families(family: str, gpus: bool) -> None:
    stock, model = both(family, gpus)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)


def test_layers_are_not_called(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in prompts nor in steps: their hooks cost the host more than their launches."""
    moved: Counter[str] = Counter()

    def counted(given: Any, device: Any, **options: Any) -> Any:
        moved[str(device)] += 1
        return send_to_device(given, device, **options)

    _, model = both(gpus=gpus)
    monkeypatch.setattr("accelerate.hooks.send_to_device", counted)
    run(model, NEW)
    assert_looped(model)
    # Arguments and keywords of the model and the output layer, and what the model gives back; those of the embedding and of
    # one rotary embedding, while the prompt is launched, recorded, and a step is launched and recorded.
    assert moved.total() <= (5 + 4 * 4 if gpus else 8 * (NEW + 2))
    moved.clear()
    run(model, NEW)
    # Everything is there.
    assert moved.total() <= (5 if gpus else 8 * (NEW + 2))


@pytest.mark.parametrize("way", WAYS)
def test_prompts(way: str, gpus: bool) -> None:
    """Recorded when their size comes up first, and then replayed whatever they hold."""
    stock, model = both(gpus=gpus, **WAYS[way])
    counts = []
    for seed in range(4):
        batch = padded_batch(seed=seed)
        assert torch.equal(run(model, 4, **batch), run(stock, 4, **batch))
        call = assert_looped(model)
        counts.append((call.appends_captured, call.appends_replayed))
    assert counts == [(1, 0), (0, 1), (0, 1), (0, 1)]


def test_a_prompt_is_recorded_in_its_first_call(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its launches, or while it runs where kernels are there; where that fails, in the second call as ever."""
    stock, model = both(gpus=gpus)
    graphs = model._fastattn.runtime.graphs
    captures: Counter[str] = Counter()
    for name in ("capture", "capture_launched", "capture_running"):
        monkeypatch.setattr(graphs.staged_type, name, _counted(getattr(graphs.staged_type, name), name, captures))

    def check(**batch: Any) -> None:
        assert torch.equal(run(model, 1, **batch), run(stock, 1, **batch))

    for seed in range(2):
        check(**padded_batch(longest=120, seed=seed))
    assert captures == {"capture_launched": 1}
    # About as long, and there are pages enough.
    for seed in range(2):
        check(**padded_batch(longest=90, seed=seed))
    assert captures == {"capture_launched": 1, "capture_running": 1} and len(graphs) == 2

    def failing(*_: Any) -> Any:
        raise RuntimeError("a kernel would have to be compiled")

    monkeypatch.setattr(graphs.staged_type, "capture_launched", _counted(failing, "failing", captures))
    captures.clear()
    for seed in range(3):
        check(**padded_batch(2, seed=seed))
    assert captures == {"failing": 1, "capture": 1} and graphs._launched is None
    assert hf_fastattn.report(model).last_call.appends_replayed == 1


def _counted(function: Any, name: str, counts: Counter[str]) -> Any:
    def counted(*args: Any) -> Any:
        counts[name] += 1
        return function(*args)

    return counted


def test_steps_of_transformers_own_loop(gpus: bool) -> None:
    """Recorded from device to device too."""
    stock, model = both(gpus=gpus)
    assert torch.equal(run(model, NEW, num_beams=3), run(stock, NEW, num_beams=3))
    call = hf_fastattn.report(model).last_call
    assert call.not_looped == {SEVERAL: 1} and not call.uncaptured
    assert call.graphs_captured == 1 and call.graphs_replayed > NEW // 2


def test_each_layer_reads_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[int] = Counter()
    attend = ReadBack.attend

    def noted(self: ReadBack, q: Any, *pages: Any, **options: Any) -> Any:
        read[self.on(q.device).page_tables[None].data_ptr()] += 1
        return attend(self, q, *pages, **options)

    with reexecuted_loop():
        _, model = both(cut=1)
        monkeypatch.setattr(ReadBack, "attend", noted)
        run(model, NEW)
    first, second = (model._fastattn.runtime.loop_graphs.state.inputs[torch.device(place)] for place in ("cpu", "cpu:0"))
    # One that warms up, and the steps.
    assert (read.pop(first.tables.data_ptr()), read.pop(second.tables.data_ptr())) == (NEW, 2 * NEW)
    # The prompt has tensors of its own on both, and is recorded behind its launches.
    assert sorted(read.values()) == [2, 4]


@pytest.mark.interpreter
@pytest.mark.parametrize("patched_first", [False, True])
def test_our_kernels(patched_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    stock, model = build("llama"), build("llama")
    if patched_first:
        hf_fastattn.patch(model)
    hf_fastattn.patch(spread(model))
    assert_fused("spread", stock, model, launched)


@pytest.mark.interpreter
def test_our_kernels_in_steps() -> None:
    stock, model = spread(build("llama")), patch_with_graphs(spread(build("llama")))
    ids = torch.randint(1, 128, (2, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "pad_token_id": 0}
    with reexecuted_loop():
        assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
    assert assert_looped(model).pages_shared


CALLS: dict[str, dict[str, Any]] = {
    "ends": {"eos_token_id": ENDS},
    "penalty": {"repetition_penalty": 1.3, "min_new_tokens": 4},
    "samples of one prompt": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "one row": single(),
    "processors": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str, gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    assert torch.equal(run(model, 30, **CALLS[call]), run(stock, 30, **CALLS[call]))
    assert_looped(model)


def test_samples(gpus: bool) -> None:
    """Draws depend on seed, row and step, not on where layers are."""
    whole, (_, model) = patch_with_graphs(tiny("llama").to("cuda" if gpus else "cpu")), both(gpus=gpus)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2}
    assert torch.equal(run(model, NEW, **options), run(whole, NEW, **options))
    assert_looped(model)


def test_beams(gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    assert torch.equal(run(model, NEW, num_beams=3), run(stock, NEW, num_beams=3))
    call = assert_fast(model)
    assert call.fast_loops == 0 and call.not_looped == {SEVERAL: 1}


def test_own_loops(gpus: bool) -> None:
    """Layers are fused, and launched one by one; the logits lie where stock's do."""
    stock, model = both(gpus=gpus)
    ids = single(9)["input_ids"].to(model.device)
    with torch.no_grad():
        want, got = stock(ids), model(ids)
        torch.testing.assert_close(got.logits, want.logits)
        last = stock.model(ids).last_hidden_state
        assert model.model(ids).last_hidden_state.device == last.device
        token = got.logits[:, -1:].argmax(-1)
        more = [side(token, past_key_values=out.past_key_values).logits for side, out in ((stock, want), (model, got))]
        torch.testing.assert_close(*more)


def test_a_batch_of_requests(gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    prompts = [single(length, length)["input_ids"][0].tolist() for length in (5, 9, 14)]
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    got = [results[name].generated_tokens for name in sorted(results, key=lambda name: int(name.split("_")[-1]))]
    ids = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    want = [stock.generate(row, max_new_tokens=6, do_sample=False)[0, row.shape[1] :].tolist() for row in ids]
    assert got == want


def test_without_hooks_again(gpus: bool) -> None:
    """Once the hooks are gone, a model on one device is like any other; what was recorded before is not replayed."""
    stock, model = both(gpus=gpus)
    run(model, NEW)
    for side in (stock, model):
        remove_hook_from_submodules(side)
        side.to("cuda" if gpus else "cpu")
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = assert_looped(model)
    assert call.graphs_captured == 1 and len(model._fastattn.runtime.loop_graphs.state.inputs) == 1


def test_one_hook_removed(gpus: bool) -> None:
    """The layer goes on where the one before it is; on a processor nothing fails for that, on GPUs stock does."""
    if gpus:
        pytest.skip("stock fails")
    stock, model = both()
    want = run(stock, NEW)
    run(model, NEW)
    remove_hook_from_module(model.model.layers[2], recurse=True)
    assert torch.equal(run(model, NEW), want)
    assert hf_fastattn.report(model).last_call.forwards == NEW


def test_a_hook_that_sends_back(gpus: bool) -> None:
    """Where it computed is not seen behind it: Transformers' way, with its reason."""
    stock, model = both(gpus=gpus)
    for side in (stock, model):
        side.model.layers[1]._hf_hook.io_same_device = True
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = hf_fastattn.report(model).last_call
    # On a processor nothing is moved, to wherever it is sent.
    assert call.forwards == NEW and call.fast_loops == (0 if gpus else 1)
    assert not gpus or any("may change or move tensors" in reason for reason in call.not_looped)


@pytest.mark.parametrize("patched_first", [False, True])
def test_undo(patched_first: bool, gpus: bool) -> None:
    stock, model = spread(tiny("llama"), gpus=gpus), tiny("llama")
    if patched_first:
        patch_with_graphs(model)
    spread(model, gpus=gpus)
    before = snapshot(model)
    patch_with_graphs(model)
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want)
    assert_looped(model)
    hf_fastattn.unpatch(model)
    assert patched_first or snapshot(model) == before
    assert torch.equal(run(model, NEW), want)
    assert "_hf_hook" in vars(model.model.layers[0])


def test_copies(gpus: bool) -> None:
    _, model = both(gpus=gpus)
    want = run(model, NEW)
    twin = patch_with_graphs(copy.deepcopy(model))
    for each in (model, twin):
        assert torch.equal(run(each, NEW), want)
        assert_looped(each)
    if not gpus:
        remove_hook_from_submodules(model)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), NEW), want)


def test_beside_adapters(gpus: bool) -> None:
    stock, model = (lora(spread(tiny("llama"), gpus=gpus)) for _ in range(2))
    patch_with_graphs(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert hf_fastattn.report(model).last_call.forwards == NEW


def test_prompts_that_begin_alike(gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    hf_fastattn.unpatch(model)
    patch_with_graphs(model, prefix_cache=True)
    for known in (0, 79):
        assert torch.equal(run(model, NEW, **single(80)), run(stock, NEW, **single(80)))
        call = hf_fastattn.report(model).last_call
        assert call.tokens_reused == known and call.fast_loops == 1


def test_an_interrupted_call(gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    with pytest.raises(KeyboardInterrupt):
        run(model, NEW, **single(), streamer=Collect(3))
    assert hf_fastattn.report(model).pages_in_use == 0
    with torch.inference_mode():
        assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)


def test_a_returned_cache(gpus: bool) -> None:
    stock, model = both(gpus=gpus)
    want, got = (run(side, NEW, return_dict_in_generate=True, **single()) for side in (stock, model))
    assert torch.equal(got.sequences, want.sequences) and hf_fastattn.report(model).last_call.fast_loops == 1
    with torch.no_grad():
        more = [
            side(out.sequences[:, -1:], past_key_values=out.past_key_values).logits
            for side, out in ((stock, want), (model, got))
        ]
    with torch.no_grad():
        exact = tiny("llama").to(stock.device).double()(got.sequences).logits[:, -1:]
    assert_close("logits", more[1], more[0], exact.to(more[0].device))


def test_tied_weights(gpus: bool) -> None:
    stock, model = both(gpus=gpus, over={"tie_word_embeddings": True}, head=False)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)


def test_mixtures_of_experts(gpus: bool) -> None:
    stock, model = both("qwen3_moe", gpus)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = assert_fast(model)
    assert call.fast_loops == 0 and call.not_looped == {SEVERAL: 1} and call.uncaptured == {SEVERAL: NEW - 1}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_hook_that_was_there_once(family: str, gpus: bool) -> None:
    """While it is there Transformers' layers run; then it is as before, for layers that cross devices and others."""
    stock, model = both(family, gpus)
    want = run(stock, NEW)
    for hooked in (False, True, False, False):
        handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None) if hooked else None
        for _ in range(2):
            assert torch.equal(run(model, NEW), want)
        if handle is not None:
            handle.remove()
    assert_fast(model)
    assert hf_fastattn.report(model).last_call.appends_replayed == (1 if family == "llama" else 0)


def test_offloaded_beside(tmp_path: Path) -> None:
    """A layer on disk, others on two devices: said once, in a call that goes Transformers' way."""
    from accelerate import cpu_offload

    stock, model = both()
    for side in (stock, model):
        remove_hook_from_module(side.model.layers[1], recurse=True)
        cpu_offload(side.model.layers[1], torch.device("cpu"))
    with reexecuted_loop():
        assert torch.equal(run(model, NEW), run(stock, NEW))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and len(call.not_looped) + len(call.fallbacks) == 1


def test_changed_frequencies(gpus: bool) -> None:
    """Written in place between calls: the copies for other devices follow."""
    stock, model = both(gpus=gpus)
    before = run(model, NEW)
    for side in (stock, model):
        side.model.rotary_emb.inv_freq.mul_(0.5)
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    assert_looped(model)


def test_rotary_copies() -> None:
    model = spread(tiny("llama"))
    copies, rotary, first = RotaryCopies(), model.model.rotary_emb, torch.device("cpu")
    states, positions = torch.zeros(2, 3, 64), torch.arange(3)[None]
    want = rotary(states, position_ids=positions)
    assert all(map(torch.equal, copies.tables(rotary, states, positions, first), want))
    held = copies._held[first][1]
    assert held is not rotary and "_hf_hook" not in vars(held) and "_hf_hook" in vars(rotary)
    rotary.inv_freq.mul_(2)
    copies.refresh()
    assert torch.equal(held.inv_freq, rotary.inv_freq) and held.inv_freq is not rotary.inv_freq


def test_routes() -> None:
    first, second = torch.device("cpu"), torch.device("cpu", 0)
    model = spread(tiny("llama"), head=False)
    assert route_of(model.model, model.lm_head, first) == (first, second, first)
    assert route_of(model.model, None, first) == (first, second)
    assert route_of(tiny("llama").model, None, first) == (first,)
