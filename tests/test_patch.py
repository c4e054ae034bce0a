"""Patching touches one instance, keeps what a user does with a model working, and can be undone without a trace."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_fastattn
from tests.models import CORE, assert_fast, padded_batch, pair, real_tokens, tiny

# The core, and what is built differently: a vision tower, a recurrent state.
UNLIKE = (*CORE, "qwen3_vl", "qwen3_next")
Snapshot = dict[str, dict[str, Any]]


def frozen(value: Any) -> Any:
    """`value` by identity; the entries of a dict (submodules, parameters, hooks) each by identity."""
    if isinstance(value, dict):
        return {key: id(entry) for key, entry in value.items()}
    return id(value)


def snapshot(model: torch.nn.Module) -> Snapshot:
    """Class and attributes of every module."""
    modules = dict(model.named_modules())
    attributes = {name: {key: frozen(value) for key, value in vars(module).items()} for name, module in modules.items()}
    for name, module in modules.items():
        attributes[name]["type"] = id(type(module))
    for name in ("config", "generation_config"):
        held = getattr(model, name, None)
        attributes[name] = {"values": repr(held)}
    return attributes


def generate(model: Any, new: int = 16, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**padded_batch(), max_new_tokens=new, do_sample=False, **kwargs)


def assert_patched_equals(stock: Any, model: Any) -> None:
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model, real_tokens(padded_batch()))


def assert_plain(model: Any, family: str) -> None:
    """A model as if it had never been near a patch."""
    stock = tiny(family)
    assert type(model) is type(stock)
    for (name, ours), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert set(vars(ours)) <= set(vars(theirs)) | {"_is_hf_initialized"}, name
    assert torch.equal(generate(model), generate(stock))


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("used", [False, True])
def test_unpatch_restores_every_attribute(family: str, used: bool) -> None:
    model = tiny(family)
    before = snapshot(model)
    assert hf_fastattn.patch(model) is model
    assert snapshot(model) != before
    if used:
        generate(model)
        generate(model, num_beams=3)
    assert hf_fastattn.unpatch(model) is model
    assert snapshot(model) == before
    assert_plain(model, family)


def test_patch_again_after_unpatch() -> None:
    stock, model = pair("llama")
    for page_size in (4, 32):
        hf_fastattn.unpatch(model)
        hf_fastattn.patch(model, page_size=page_size)
        assert_patched_equals(stock, model)


def test_patched_is_undone_at_the_end() -> None:
    model = tiny("qwen2")
    before = snapshot(model)
    with hf_fastattn.patched(model, page_size=8) as inside:
        assert inside is model
        assert_patched_equals(tiny("qwen2"), model)
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_patched_is_undone_after_an_exception(error: type[BaseException]) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(error, match="inside"):
        with hf_fastattn.patched(model):
            generate(model)
            raise error("inside")
    assert snapshot(model) == before


@pytest.mark.parametrize("family", CORE)
def test_other_models_are_untouched(family: str) -> None:
    other = tiny(family)
    before = snapshot(other)
    classes = {type(module) for module in other.modules()} | {GenerationMixin}
    class_attributes = {cls: dict(vars(cls)) for cls in classes}
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    model = hf_fastattn.patch(tiny(family))
    generate(model)
    assert snapshot(other) == before
    for cls, attributes in class_attributes.items():
        assert dict(vars(cls)) == attributes, cls
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert_plain(other, family)
    assert_plain(tiny(family), family)


def parameters(function: Any) -> list[tuple[str, Any]]:
    """What callers and `generate()` see of a signature."""
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("family", CORE)
def test_a_patched_model_looks_like_its_class(family: str) -> None:
    stock, model = pair(family)
    assert isinstance(model, type(stock))
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(type(stock), name)
    assert repr(model) == repr(stock)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for (name, ours), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert parameters(ours.forward) == parameters(theirs.forward), name
    for name in ("generate", "prepare_inputs_for_generation"):
        assert parameters(getattr(model, name)) == parameters(getattr(stock, name))


def test_patch_twice() -> None:
    model = hf_fastattn.patch(tiny("llama"), page_size=32)
    before = snapshot(model)
    assert hf_fastattn.patch(model, page_size=32) is model
    assert hf_fastattn.patch(model, hf_fastattn.FastAttnConfig(page_size=32)) is model
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"(?s)32.*unpatch|unpatch.*32"):
        hf_fastattn.patch(model, page_size=16)
    assert snapshot(model) == before
    hf_fastattn.unpatch(model)
    assert_plain(model, "llama")


def test_unknown_option() -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"(?s)page_sise.*page_size"):
        hf_fastattn.patch(model, page_sise=16)
    with pytest.raises(TypeError, match="page_sise"):
        with hf_fastattn.patched(model, page_sise=16):
            pass
    with pytest.raises(TypeError):
        hf_fastattn.patch(model, {"page_size": 16})
    with pytest.raises(TypeError):
        hf_fastattn.patch(model, hf_fastattn.FastAttnConfig(), page_size=16)
    assert snapshot(model) == before


@pytest.mark.parametrize("size", [0, -16, 3, 24, 2048])
def test_page_size_must_be_a_power_of_two(size: int) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"(?s){size}.*power of two"):
        hf_fastattn.patch(model, page_size=size)
    assert snapshot(model) == before


@pytest.mark.parametrize("option", [{"backend": "cuda"}, {"sampling": "fast?"}, {"memory_limit": 0}, {"keep_memory": 2}])
def test_values_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        hf_fastattn.patch(tiny("llama"), **option)


def test_unsupported_model() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)gpt2.*llama"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", ["meta-llama/Llama-3.2-1B", torch.nn.Linear(2, 2), None])
def test_not_a_model(thing: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        hf_fastattn.patch(thing)


def test_a_dynamic_rope_is_right_or_refused() -> None:
    """`dynamic` RoPE recomputes its frequencies from the longest position, per forward."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    over = {"rope_parameters": rope, "max_position_embeddings": 40}
    stock, model = pair("llama", **over)
    assert_patched_equals(stock, model)


def test_forward_replaced_by_someone_else() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def traced(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    attention.forward = traced
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before


def test_layer_of_a_patched_model() -> None:
    donor = hf_fastattn.patch(tiny("llama"))
    model = tiny("llama")
    model.model.layers[2] = donor.model.layers[2]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before
    hf_fastattn.unpatch(donor)
    assert_patched_equals(tiny("llama"), hf_fastattn.patch(model))


def test_copied_layer_of_a_patched_model_is_plain_or_refused() -> None:
    donor = hf_fastattn.patch(tiny("llama"))
    model = tiny("llama")
    model.model.layers[2] = copy.deepcopy(donor.model.layers[2])
    if "forward" in vars(model.model.layers[2].self_attn):
        with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
            hf_fastattn.patch(model)
    else:
        assert_patched_equals(tiny("llama"), hf_fastattn.patch(model))


@pytest.mark.parametrize("family", UNLIKE)
def test_deepcopy_is_plain(family: str) -> None:
    stock, model = pair(family)
    generate(model)
    twin = copy.deepcopy(model)
    assert_plain(twin, family)
    assert_patched_equals(stock, model)
    assert_patched_equals(stock, hf_fastattn.patch(twin, page_size=4))
    hf_fastattn.unpatch(model)
    assert_patched_equals(stock, twin)


@pytest.mark.parametrize("family", UNLIKE)
def test_pickle_is_plain(family: str) -> None:
    stock, model = pair(family)
    generate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_plain(torch.load(file, weights_only=False), family)
    assert_plain(pickle.loads(pickle.dumps(model)), family)
    assert_patched_equals(stock, model)


@pytest.mark.parametrize("family", CORE)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    stock, model = pair(family)
    generate(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(stock).__name__]
    assert "fastattn" not in json.dumps(config).lower()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) in (LlamaForCausalLM, Qwen2ForCausalLM)
    assert torch.equal(generate(loaded), generate(stock))


def test_a_patched_model_can_be_collected() -> None:
    model = hf_fastattn.patch(tiny("llama"))
    generate(model, return_dict_in_generate=True)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("patch_first", [False, True])
def test_lora(family: str, patch_first: bool) -> None:
    plain = tiny(family)
    stock = lora(tiny(family))
    if patch_first:
        model = lora(hf_fastattn.patch(tiny(family)))
    else:
        model = hf_fastattn.patch(lora(tiny(family)))
    assert not torch.equal(generate(stock), generate(plain))
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model.get_base_model(), real_tokens(padded_batch()))
    with model.disable_adapter():
        assert torch.equal(generate(model), generate(plain))
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model.get_base_model(), real_tokens(padded_batch()))


def test_lora_is_unpatched_without_a_trace() -> None:
    model = lora(tiny("llama"))
    before = snapshot(model)
    hf_fastattn.patch(model)
    generate(model)
    hf_fastattn.unpatch(model)
    assert snapshot(model) == before


def test_lora_taken_off_while_patched() -> None:
    stock, model = pair("llama")
    wrapped = lora(model)
    generate(wrapped)
    unwrapped = wrapped.unload()
    assert_patched_equals(stock, unwrapped)


def gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of the loss over the real tokens of the padded batch."""
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.zero_grad()
    model(**batch, labels=labels, **kwargs).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found and all(gradient.isfinite().all() for gradient in found.values())
    return found


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_stock(family: str, checkpointing: bool, training: bool) -> None:
    stock, model = pair(family)
    for side in (stock, model):
        side.train(training)
        if checkpointing:
            side.gradient_checkpointing_enable()
    generate(model)
    expected, ours = gradients(stock), gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name
    assert set(expected) == {name for name, _ in stock.named_parameters()}


def test_gradients_of_lora_equal_stock() -> None:
    expected = gradients(lora(tiny("qwen2")).train())
    ours = gradients(hf_fastattn.patch(lora(tiny("qwen2"))).train())
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("family", CORE)
def test_gradients_through_a_paged_cache(family: str) -> None:
    stock, model = pair(family)
    expected = gradients(stock, past_key_values=DynamicCache(config=stock.config))
    ours = gradients(model, past_key_values=hf_fastattn.PagedCache(model.config))
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4)
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("grad" in reason for reason in fallbacks)


@pytest.mark.parametrize("family", CORE)
def test_train_mode_generates_on_the_fast_path(family: str) -> None:
    stock, model = pair(family)
    stock.train()
    model.train()
    with torch.no_grad():
        assert_patched_equals(stock, model)
    assert model.training


@pytest.mark.parametrize("training", [False, True])
def test_memory_between_calls(training: bool) -> None:
    """A model in train mode keeps no pages, so that a training step finds its memory free."""
    _, model = pair("qwen2_window")
    generate(model.train(training))
    assert (hf_fastattn.report(model).page_bytes_allocated > 0) != training
    assert hf_fastattn.report(model).pages_in_use == 0


def test_keep_memory_zero() -> None:
    stock, model = pair("llama", {"keep_memory": 0})
    for _ in range(2):
        assert_patched_equals(stock, model)
        assert hf_fastattn.report(model).page_bytes_allocated == 0


def test_dropout_falls_back() -> None:
    stock, model = pair("llama", attention_dropout=0.2)
    assert_patched_equals(stock, model)
    stock.train()
    model.train()
    assert torch.equal(generate(model), generate(stock))
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("dropout" in reason for reason in fallbacks)


def test_weights_may_change_in_place() -> None:
    stock, model = pair("qwen2")
    first = generate(model)
    for step in range(3):
        for side in (stock, model):
            generator = torch.Generator().manual_seed(step)
            for parameter in side.parameters():
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        assert_patched_equals(stock, model)
    assert not torch.equal(generate(model), first)


class Count(ModelHook):
    """Counts the forwards that it sees."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("everywhere", [False, True])
def test_accelerate_hooks_are_kept(everywhere: bool) -> None:
    stock, model, hook = tiny("llama"), tiny("llama"), Count()
    for name, module in model.named_modules():
        if everywhere or name.endswith("self_attn"):
            add_hook_to_module(module, hook)
    before = snapshot(model)
    hf_fastattn.patch(model)
    hook.calls = 0
    assert_patched_equals(stock, model)
    assert hook.calls >= 3 * 16
    hf_fastattn.unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(generate(model), generate(stock))


def test_accelerate_hook_added_after_the_patch() -> None:
    stock, model = pair("llama")
    hook = Count()
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, hook)
    assert_patched_equals(stock, model)
    assert hook.calls >= 3 * 16


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("paged", [False, True])
def test_hidden_states_of_a_forward(family: str, paged: bool) -> None:
    stock, model = pair(family)
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        expected = stock(**padded_batch(), output_hidden_states=True)
        cache = hf_fastattn.PagedCache(model.config) if paged else None
        ours = model(**padded_batch(), output_hidden_states=True, past_key_values=cache)
    assert len(ours.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    if paged:
        assert_fast(model, held=None)


@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([30, 36])])
def test_logits_to_keep(keep: Any) -> None:
    stock, model = pair("llama")
    with torch.no_grad():
        expected = stock(**padded_batch(), logits_to_keep=keep).logits
        cache = hf_fastattn.PagedCache(model.config)
        ours = model(**padded_batch(), logits_to_keep=keep, past_key_values=cache).logits
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours[:, -1], expected[:, -1], rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


@pytest.mark.parametrize("family", CORE)
def test_inference_mode_and_no_grad_take_turns(family: str) -> None:
    stock, model = pair(family)
    cache = hf_fastattn.PagedCache(model.config)
    tokens, mask = padded_batch()["input_ids"], padded_batch()["attention_mask"]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_patched_equals(stock, model)
            tokens = model.generate(
                tokens.clone(),
                attention_mask=mask.clone(),
                max_new_tokens=9,
                do_sample=False,
                past_key_values=cache,
            )
            assert_fast(model, held=None)
        grown = tokens.shape[1] - mask.shape[1]
        mask = torch.cat([mask, torch.ones(3, grown, dtype=mask.dtype)], 1)
    assert torch.equal(tokens, generate(stock, 27))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moved_to_another_dtype_after_the_patch(dtype: torch.dtype) -> None:
    stock, model = pair("qwen2_window")
    generate(model)
    stock.to(dtype)
    model.to(dtype)
    if dtype == torch.float64:
        assert_patched_equals(stock, model)
    else:
        assert generate(model).shape == (3, 37 + 16)
        assert_fast(model, real_tokens(padded_batch()))


def test_attention_implementation_may_be_switched() -> None:
    stock, model = pair("llama")
    for name in ("eager", "sdpa"):
        stock.set_attn_implementation(name)
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert_patched_equals(stock, model)


def test_compile_of_a_patched_model() -> None:
    stock, model = pair("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")
    cache = hf_fastattn.PagedCache(model.config)
    theirs = DynamicCache(config=stock.config)
    ids = padded_batch(2)["input_ids"].clamp_min(1)
    with torch.no_grad():
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:32]):
            ours = compiled(part, past_key_values=cache).logits
            expected = stock(part, past_key_values=theirs).logits
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)
    torch.compiler.reset()


def test_base_model_of_a_patched_model() -> None:
    """`model.model(...)`, as reward and embedding code calls it."""
    stock, model = pair("qwen2")
    assert isinstance(model.model, type(stock.model))
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        expected = stock.model(**padded_batch()).last_hidden_state
        ours = model.model(**padded_batch()).last_hidden_state
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-3, atol=1e-3)


def test_warns_outside_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.patching.TESTED", ("5.1", "5.2"))
    with pytest.warns(UserWarning, match="tested with transformers >= 5.1 and < 5.2, this is 5"):
        hf_fastattn.patch(tiny("llama"))
