"""Decode steps replayed from CUDA graphs: fp32 tokens equal to stock, whatever happens to the model in between."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.pages import reach
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
    single,
    tiny,
)

pytestmark = pytest.mark.gpu

# Families whose states lie in two places, read and written in turn: a step is recorded for each.
TWO_PLACES = ("next", "qwen3_5")
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "samples": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
}


def cuda_pair(family: str, **over: Any) -> tuple[Any, Any]:
    stock, model = (model.to("cuda") for model in pair_with_graphs(family, **over))
    return stock, model


class Unchanged(LogitsProcessor):
    """A user's own, so that Transformers' own loop runs."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to("cuda") for name, value in batch.items()}


def run(model: Any, new: int = 48, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    given = {**padded_batch(), **{name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}}
    options = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
    options.setdefault("logits_processor", LogitsProcessorList([Unchanged()]))
    return model.generate(**on_gpu(given), **{"max_new_tokens": new, "do_sample": False, **options})


def replays(model: Any) -> tuple[int, int]:
    call = hf_fastattn.report(model).last_call
    return call.graphs_captured, call.graphs_replayed


def graphs(model: Any) -> ForwardGraphs:
    return model._fastattn.runtime.graphs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_tokens_equal_stock(family: str, call: str) -> None:
    stock, model = cuda_pair(family)
    want = run(stock, **CALLS[call])
    for _ in range(2):
        assert torch.equal(run(model, **CALLS[call]), want)
        captured, replayed = replays(model)
        most = 8 if any(part in family for part in TWO_PLACES) else 4
        assert replayed >= 46 and captured <= most and not assert_fast(model).uncaptured


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_batches(family: str, rows: int) -> None:
    stock, model = cuda_pair(family)
    # Lengths for which no row comes to a choice between two tokens that fp32 cannot tell apart.
    batch = padded_batch(rows, 41 + rows)
    assert torch.equal(run(model, **batch), run(stock, **batch))
    assert replays(model)[1] == 46


@pytest.mark.parametrize("family", CORE)
def test_assistants(family: str) -> None:
    stock, model = cuda_pair(family)
    assistant = patch_with_graphs(noisy(tiny(family)).to("cuda"))
    want = run(stock, **single())
    assert torch.equal(run(model, assistant_model=assistant, **single()), want)
    # Outside of any call of its own the assistant drafts one token after the other.
    assert len(graphs(assistant)) > 0
    repeated = {"input_ids": single(12)["input_ids"].repeat(1, 3), "attention_mask": torch.ones(1, 36, dtype=torch.long)}
    want = run(stock, **repeated)
    assert torch.equal(run(model, prompt_lookup_num_tokens=4, **repeated), want)
    assert torch.equal(run(model, assistant_early_exit=1, **repeated), want)
    assert replays(model)[1] > 0


def test_processors_scores_and_returned_cache() -> None:
    class Noise(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.roll(int(input_ids[0, -1]) % 5, -1)

    stock, model = cuda_pair("llama")
    options = {"return_dict_in_generate": True, "output_scores": True, "logits_processor": LogitsProcessorList([Noise()])}
    want, ours = run(stock, **options), run(model, **options)
    assert torch.equal(ours.sequences, want.sequences)
    for theirs, mine in zip(want.scores, ours.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)
    more = on_gpu({"input_ids": torch.randint(1, VOCAB, (3, 5))})["input_ids"]
    mask = torch.cat((on_gpu(padded_batch())["attention_mask"], more.new_ones(3, 48 + 5)), 1)
    turn = {"input_ids": torch.cat((want.sequences, more), 1), "attention_mask": mask}
    again = {"max_new_tokens": 20, "do_sample": False}
    second = stock.generate(**turn, **{CACHE: want[CACHE]}, **again)
    assert torch.equal(model.generate(**turn, **{CACHE: ours[CACHE]}, **again), second)
    assert replays(model)[1] > 0


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_that_move_in_mid_generation(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    monkeypatch.setattr(reach, "AHEAD", 8)
    stock, model = tiny("qwen2_window").to("cuda"), tiny("qwen2_window").to("cuda")
    patch_with_graphs(model, page_size=page_size)
    # Without an end token there would be pages for all steps from the start, and beams take theirs before the first step.
    assert torch.equal(run(model, 120, eos_token_id=VOCAB - 1), run(stock, 120, eos_token_id=VOCAB - 1))
    captured, replayed = replays(model)
    assert replayed == 118 and (captured > 1 or page_size > 1)
    assert torch.equal(run(model, 120, num_beams=4), run(stock, 120, num_beams=4))
    assert replays(model)[1] == 118


# ---- what a graph depends on --------------------------------------------------------------------------------------


def test_weights_changed_in_place_are_seen() -> None:
    stock, model = cuda_pair("llama")
    before = run(model)
    with torch.no_grad():
        for candidate in (stock, model):
            for parameter in candidate.parameters():
                parameter.mul_(1.02)
    want = run(stock)
    assert torch.equal(run(model), want) and not torch.equal(want, before)
    assert replays(model) == (0, 47)


def replace_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def to_double_and_back(model: Any) -> None:
    held = [parameter.data for parameter in model.parameters()]
    model.to(torch.float64).to(torch.float32)
    for parameter in held:
        parameter.fill_(float("nan"))


def change_number(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


@pytest.mark.parametrize("change", [replace_weight, to_double_and_back, change_number])
def test_a_changed_model_is_captured_anew(change: Any) -> None:
    stock, model = cuda_pair("llama")
    run(model)
    for candidate in (stock, model):
        change(candidate)
    assert torch.equal(run(model), run(stock))
    assert replays(model)[0] == 1


def test_another_dtype() -> None:
    model = patch_with_graphs(tiny("llama").to("cuda"))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        # A copy: a cast to 16 bits and back leaves its trace in weights and frequencies.
        plain = patch_with_graphs(copy.deepcopy(model), cuda_graphs=False)
        assert torch.equal(run(model), run(plain))
        assert replays(model)[1] >= 46


def test_adapters() -> None:
    peft_library = pytest.importorskip("peft")

    def lora() -> Any:
        torch.manual_seed(4)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
        peft = peft_library.get_peft_model(tiny("llama"), peft_library.LoraConfig(**options), "first")
        peft.add_adapter("second", peft_library.LoraConfig(**options, lora_alpha=32))
        return peft.to("cuda")

    stock, model = lora(), lora()
    patch_with_graphs(model)
    for change in (lambda peft: None, lambda peft: peft.set_adapter("second"), lambda peft: peft.merge_adapter()):
        for peft in (stock, model):
            change(peft)
        assert torch.equal(run(model), run(stock))
        assert replays(model)[1] > 0
        with stock.disable_adapter(), model.disable_adapter():
            assert torch.equal(run(model), run(stock))
            assert replays(model)[1] > 0


def test_hooks_are_called() -> None:
    stock, model = cuda_pair("llama")
    run(model)
    calls = []
    for candidate in (stock, model):
        module = candidate.model.layers[1].mlp
        handle = module.register_forward_hook(lambda module, args, output: calls.append(1) or output * 1.01)
    assert torch.equal(run(model, 8), run(stock, 8))
    assert len(calls) == 16 and replays(model) == (0, 0)
    handle.remove()
    run(model)
    assert replays(model)[1] > 0


# ---- bounds and failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_exceptions_of_a_streamer(step: int) -> None:
    class Streamer:
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count > step:
                raise KeyboardInterrupt("inside")

        def end(self) -> None:
            """Nothing to do."""

    stock, model = cuda_pair("qwen2_window")
    with pytest.raises(KeyboardInterrupt, match="inside"):
        run(model, streamer=Streamer(), **single())
    assert hf_fastattn.report(model).pages_in_use == 0
    assert torch.equal(run(model), run(stock))
    assert replays(model)[1] > 0


def test_two_models_in_turn_and_inside_each_other() -> None:
    pairs = [tuple(model.to("cuda") for model in pair_with_graphs("llama", seed=seed)) for seed in (0, 1)]
    (stock, model), (other_stock, other) = pairs
    wanted = [run(stock, 24), run(other_stock, 24)]

    class Inner(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] % 5 == 0:
                assert torch.equal(run(other, 24), wanted[1])
            return scores

    for _ in range(2):
        assert torch.equal(run(model, 24, logits_processor=LogitsProcessorList([Inner()])), wanted[0])
    assert replays(model)[1] == 23 and replays(other) == (0, 23)


def test_inference_mode_then_no_grad() -> None:
    stock, model = cuda_pair("llama")
    want = run(stock)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(run(model), want)
            assert replays(model)[1] > 0


def test_loops_on_other_streams() -> None:
    stock, model = cuda_pair("llama")
    ids = on_gpu(single(60))["input_ids"]
    with torch.no_grad():
        want = stock(ids).logits[:, 20:]
        cache = hf_fastattn.PagedCache(model.config)
        model(ids[:, :20], **{CACHE: cache})
        parts, streams = [], [torch.cuda.Stream() for _ in range(3)]
        for column in range(20, 60):
            stream = streams[column % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                parts.append(model(ids[:, column : column + 1], **{CACHE: cache}).logits)
            torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-3, rtol=1e-3)
    assert replays(model)[1] == 39


def test_the_host_may_run_ahead() -> None:
    """Twenty steps are asked for while the device is still busy: none may read the numbers of a later one."""
    stock, model = cuda_pair("llama")
    ids = on_gpu(single(80))["input_ids"]
    big = torch.randn(8192, 8192, device="cuda")
    with torch.no_grad():
        want = stock(ids).logits[:, 60:]
        for _ in range(2):
            cache = hf_fastattn.PagedCache(model.config)
            parts = [model(ids[:, :60], **{CACHE: cache}).logits[:, :0]]
            torch.cuda.synchronize()
            for _ in range(20):
                big = (big @ big).clamp(-1, 1)
            parts += [model(ids[:, column : column + 1], **{CACHE: cache}).logits for column in range(60, 80)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-3, rtol=1e-3)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_our_part_of_a_step_never_waits(padded: bool, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fixture that writes NaN to freed pages waits.
    monkeypatch.undo()
    stock, model = cuda_pair("qwen2_window")
    batch = padded_batch() if padded else padded_batch(1)
    want = run(stock, num_beams=beams, **batch)
    run(model, num_beams=beams, **batch)
    kind = type(model)
    forward, steps = kind.forward, []

    @functools.wraps(forward)
    def strict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs[CACHE].get_seq_length() <= batch["input_ids"].shape[1] + 1:
            return forward(self, *args, **kwargs)
        steps.append(1)
        with no_waiting():
            return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", strict)
    assert torch.equal(run(model, num_beams=beams, **batch), want)
    assert len(steps) >= 40 and replays(model) == (0, 47)


def test_copies_have_no_graphs() -> None:
    model = patch_with_graphs(tiny("llama").to("cuda"))
    want = run(model)
    plain = copy.deepcopy(model)
    assert not hasattr(plain, "_fastattn") and torch.equal(run(plain), want)
    patch_with_graphs(plain)
    assert torch.equal(run(plain), want) and replays(plain)[0] == 1
