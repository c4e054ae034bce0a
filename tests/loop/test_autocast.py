"""fp32 weights under autocast, as trainers generate: the device's loop computes what autocast computes, and nothing stale.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`). Without the interpreter their
layers are Transformers' own.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import hf_fastattn
from hf_fastattn.autocast import forward_dtype, why_not_forward
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.weight_copies import WeightCopies, copies_fit
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.patches.fused.weights_read import weights_read
from hf_fastattn.transformers_version import CACHE
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.accelerator import own_accelerator
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.models import padded_batch, patch_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop

# The interpreter is slow.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NEW = 4 if INTERPRETING else 12
SMALL = {"num_hidden_layers": 2, "initializer_range": 0.1}
# With the interpreter and on a GPU the layers are fused.
DEVICES = [
    "cpu",
    pytest.param("interpreter", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def accelerate_anew() -> Iterator[None]:
    with own_accelerator():
        yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("hf_fastattn.loop.loop_graphs.WORTH_COPYING", NEW)
    on_cpu = request.param != "cuda"
    with reexecuted_loop() if on_cpu else contextlib.nullcontext():
        yield "cpu" if on_cpu else "cuda"


def prepared(model: Any, device: str) -> Any:
    """As accelerate prepares it for mixed precision; its trainers keep the wrapper while they generate."""
    return Accelerator(mixed_precision="bf16", cpu=device == "cpu").prepare(model.to(device))


def nearly_best(stock: Any, sequences: Tensor, mask: Tensor, prompt: int) -> bool:
    """Whether each new token is stock's choice, or as near to it as autocast's own error allows.

    Args:
        stock: fp32, not prepared.
        sequences: `[B, prompt + new]`; `mask [B, prompt]` of the prompt.
    """
    device = stock.device
    ids, mask = sequences.to(device), mask.to(device)
    mask = torch.cat((mask, mask.new_ones(ids.shape[0], ids.shape[1] - prompt)), 1)
    with torch.no_grad():
        exact = stock(ids, attention_mask=mask).logits
        with torch.autocast(device.type, torch.bfloat16):
            plain = stock(ids, attention_mask=mask).logits.float()
    seen = mask.bool()
    error = (plain - exact)[seen].abs().max()
    chosen = plain[:, prompt - 1 : -1].gather(-1, ids[:, prompt:, None])[..., 0]
    return bool((plain[:, prompt - 1 : -1].amax(-1) - chosen <= 4 * error).all())


@pytest.mark.parametrize("how", ["wrapped", "wrapped after patch", "region", "train mode"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens(family: str, how: str, device: str) -> None:
    if INTERPRETING and (family, how) not in (("qwen3", "wrapped"), ("llama", "region")):
        pytest.skip("two of them are enough there")
    stock = tiny(family, **SMALL).to(device)
    model, region = tiny(family, **SMALL).to(device), contextlib.nullcontext()
    if how in ("wrapped", "train mode"):
        model = patch_with_graphs(prepared(model, device))
    else:
        model = patch_with_graphs(model)
        model = prepared(model, device) if how == "wrapped after patch" else model
    model.train(how == "train mode")
    batch = padded_batch(2, 5)
    with torch.autocast(device, torch.bfloat16) if how == "region" else region:
        tokens = run(model, NEW, **batch)
    assert_looped(model)
    assert model._fastattn.runtime._made_for[0] is torch.bfloat16
    assert nearly_best(stock, tokens, batch["attention_mask"], 5)
    # Without the region, and once accelerate's wrapper is off, the same model computes in fp32 again.
    if how != "region":
        Accelerator().unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    assert torch.equal(run(model, NEW, **batch), run(stock, NEW, **batch))
    assert_looped(model)


def test_only_products_are_narrow(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream behind each layer is fp32, and as near to fp32's as autocast's: one in bf16 would be further."""
    from hf_fastattn.kernels import rehearsal
    from hf_fastattn.patches.fused import layers

    stock = tiny("qwen3", **SMALL).to(device)
    model = hf_fastattn.patch(copy.deepcopy(stock))
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        exact = stock(ids, output_hidden_states=True).hidden_states
        with torch.autocast(device, torch.bfloat16):
            plain = stock(ids, output_hidden_states=True).hidden_states
        narrow = copy.deepcopy(stock).bfloat16()(ids, output_hidden_states=True).hidden_states
    streams: list[Tensor] = []
    mlp = layers._mlp

    def noted(*args: Any) -> Any:
        x, delta = mlp(*args)
        if not rehearsal.is_under_way():
            streams.append(x if delta is None else x + delta)
        return x, delta

    monkeypatch.setattr(layers, "_mlp", noted)
    if fused_reason(model.model) is not None:
        pytest.skip("the layers are not fused here")
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        out = model(ids, **{CACHE: hf_fastattn.PagedCache(model.config)}, use_cache=True).logits
    assert out.dtype is torch.bfloat16 and len(streams) == 2
    for index, stream in enumerate(streams[:-1], 1):
        assert stream.dtype is torch.float32
        # Behind the tokens stands what the bucket was filled up with.
        error = (stream[: ids.numel()].view_as(exact[index]) - exact[index]).abs()
        assert error.max() <= 2 * (plain[index] - exact[index]).abs().max()
        assert error.mean() < (narrow[index].float() - exact[index]).abs().mean()


def fused_step(model: Any) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimiser.step()
    optimiser.zero_grad()


def data_assigned(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()


def data_written(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(-0.5)


def loaded(model: Any) -> None:
    model.load_state_dict({name: value.roll(1, 0) for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [fused_step, data_assigned, data_written, loaded])
def test_no_weight_is_stale(change: Callable[[Any], None], device: str) -> None:
    if INTERPRETING and change is not fused_step:
        pytest.skip("one of them is enough there")
    model = patch_with_graphs(prepared(tiny("qwen3", **SMALL), device))
    before = run(model, NEW, **padded_batch(2, 5))
    change(model)
    tokens = run(model, NEW, **padded_batch(2, 5))
    assert_looped(model)
    fresh = patch_with_graphs(prepared(tiny("qwen3", **SMALL), device))
    change(fresh)
    assert torch.equal(tokens, run(fresh, NEW, **padded_batch(2, 5))) and not torch.equal(tokens, before)


@pytest.mark.parametrize("steps", [NEW - 1, NEW])
def test_copies_are_made_where_they_are_read_and_pay(steps: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", 0)
    model = patch_with_graphs(prepared(tiny("llama", **SMALL), device))
    run(model, steps, **padded_batch(2, 5))
    copies = model._fastattn.runtime.loop_graphs.copies
    # Layers that are not fused are called, and would not read them.
    assert (copies is not None) == (steps == NEW and fused_reason(model.model) is None)
    held = model.model.layers[0].mlp.up_proj.weight
    assert copies is None or torch.equal(copies.get(held), held.bfloat16())
    # They go with the graphs, when memory is given back to training.
    model.train()
    run(model, steps, **padded_batch(2, 5))
    assert model._fastattn.runtime.loop_graphs.copies is None


def test_16_bit_weights_need_no_copies(device: str) -> None:
    if INTERPRETING:
        pytest.skip("the layers' kernels make no difference")
    model = patch_with_graphs(prepared(tiny("llama", **SMALL).bfloat16(), device))
    run(model, NEW, **padded_batch(2, 5))
    assert_looped(model)


@pytest.mark.parametrize("why", ["asked for", "small", None])
def test_what_training_keeps(why: str | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, copies and pages of a rollout, for the next one, where they were asked for or are small."""
    keep = why is not None
    if why != "small":
        monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", 0)
    model = patch_with_graphs(prepared(tiny("qwen3", **SMALL), device), keep_in_training=why == "asked for").train()
    tokens = run(model, NEW, **padded_batch(2, 5))
    report, graphs = hf_fastattn.report(model), model._fastattn.runtime.loop_graphs
    assert bool(report.page_bytes_allocated) == keep == (len(graphs) > 0)
    assert (graphs.copies is not None) == (keep and fused_reason(model.model) is None)
    fused_step(model)
    again = run(model, NEW, **padded_batch(2, 5))
    assert assert_looped(model).graphs_captured == (not keep) and not torch.equal(again, tokens)


@pytest.mark.parametrize("why", ["no room", "asked for"])
def test_without_copies(why: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no room":
        monkeypatch.setattr("hf_fastattn.loop.loop_graphs.copies_fit", lambda *needed: False)
    model = patch_with_graphs(prepared(tiny("qwen3", **SMALL), device), autocast_copies=why == "no room")
    batch = padded_batch(2, 5)
    tokens = run(model, NEW, **batch)
    assert_looped(model)
    assert model._fastattn.runtime.loop_graphs.copies is None
    assert nearly_best(tiny("qwen3", **SMALL).to(device), tokens, batch["attention_mask"], 5)


def test_a_peft_model_that_was_prepared_runs_in_fp32(device: str) -> None:
    """Its `generate()` calls the model inside, by-passing the wrapper."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    stock = peft.get_peft_model(tiny("qwen3"), config)
    model = copy.deepcopy(stock)
    hf_fastattn.patch(model, cuda_graphs=True)
    sides = [prepared(side, device) for side in (stock, model)]
    assert all(forward_dtype(side) is torch.bfloat16 for side in sides)
    want, tokens = (run(side, NEW, **padded_batch(2, 5)) for side in sides)
    assert torch.equal(tokens, want)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and not call.fallbacks
    assert model.get_base_model()._fastattn.runtime.loop_graphs.copies is None


def test_only_weights_that_are_read_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither LoRA's A and B, nor the weights of layers that are called."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("hf_fastattn.loop.loop_graphs.WORTH_COPYING", NEW)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    with reexecuted_loop(), fused_in_torch():
        model = patch_with_graphs(peft.get_peft_model(tiny("qwen3", **SMALL), config).eval())
        base = model.get_base_model()
        base.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, given, out: out)
        found = weights_read(base, torch.bfloat16)
        names = {name for name, weight in base.named_parameters() if any(weight is one for one in found)}
    expected = {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            "self_attn.q_proj.base_layer", "self_attn.k_proj", "self_attn.v_proj.base_layer", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj.base_layer",
        )
    }  # fmt: skip
    assert names == expected - {"model.layers.1.mlp.up_proj.weight"} | {"lm_head.weight"}


def test_adapters_are_read_anew_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("hf_fastattn.loop.loop_graphs.WORTH_COPYING", NEW)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)

    def adapted() -> Any:
        torch.manual_seed(0)
        return patch_with_graphs(peft.get_peft_model(tiny("qwen3", **SMALL), config).eval())

    def tokens(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, NEW, **padded_batch(2, 13))
        assert assert_looped(model).adapters_fused
        return out

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(-0.9)

    with reexecuted_loop(), fused_in_torch():
        model, fresh = adapted(), adapted()
        before = tokens(model)
        assert model.get_base_model()._fastattn.runtime.loop_graphs.copies is not None
        change(model)
        change(fresh)
        after = tokens(model)
        assert torch.equal(after, tokens(fresh)) and not torch.equal(after, before)


def test_other_wrappers_are_not_taken_for_it() -> None:
    model = tiny("llama")
    assert forward_dtype(model) is None and why_not_forward(model) is None
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert "replaced" in (why_not_forward(model) or "")
    wrapped = prepared(model, "cpu")
    assert "replaced" in (why_not_forward(wrapped) or "")


def test_graphs_of_another_dtype_are_not_replayed() -> None:
    with reexecuted_loop():
        model = patch_with_graphs(tiny("llama"))
        want = run(model, NEW)
        with torch.autocast("cpu", torch.bfloat16):
            run(model, NEW)
        assert assert_looped(model).graphs_captured > 0
        assert torch.equal(run(model, NEW), want)
        assert assert_looped(model).graphs_captured > 0
        assert isinstance(model._fastattn.runtime.loop_graphs, LoopGraphs)


def test_copies_leave_room_for_the_pages_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that would fit in Transformers must not fail for want of what the copies took."""
    needed = WeightCopies.bytes_needed([torch.zeros(30, 10)], torch.bfloat16)
    assert needed == 600
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed + 100, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert copies_fit(device, needed, 100) and not copies_fit(device, needed, 101)


def test_a_region_is_part_of_what_graphs_depend_on() -> None:
    """Also where the pages are of the same dtype within it and without it, as those of 16-bit weights."""
    decoder, device = tiny("llama").bfloat16().model, torch.device("cpu")
    plain = fingerprint_of(decoder, device)
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint_of(decoder, device).parts != plain.parts
    assert fingerprint_of(decoder, device) == plain
