"""PEFT's other adapters: called in the recorded step, with stock's tokens, and seen when they change.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`). What a recording would not
take (results that the host waits for, shapes that depend on values) fails on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.models import OLD, assert_fast, padded_batch, patch_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop

peft = pytest.importorskip("peft")

NEW = 8
ON = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LORA = {**ON, "r": 4, "init_lora_weights": False}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "biases": lambda: peft.LoraConfig(**LORA, lora_bias=True),
    "embeddings and head": lambda: peft.LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "modules to save": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "ia3": lambda: peft.IA3Config(**ON, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(**ON, r=4, alpha=32, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(**ON, r=4, init_weights=False),
    "oft": lambda: peft.OFTConfig(**ON, r=0, oft_block_size=8, init_weights=False),
    "hra": lambda: peft.HRAConfig(**ON, r=4, init_weights=False),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# Adapters that copy from the host at every step.
WAITING: dict[str, Callable[[], Any]] = {
    "tokens beside lora": lambda: peft.LoraConfig(**LORA, trainable_token_indices=list(range(1, 90))),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(1, 90)), task_type="CAUSAL_LM"),
    "fourier": lambda: peft.FourierFTConfig(**ON, n_frequency=200, scaling=300.0),
}
# Virtual tokens come before every new one where PEFT does not know the cache's name: steps are forwards of several tokens.
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=["called", "fused", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with reexecuted_loop(), fused_in_torch() if request.param == "fused" else contextlib.nullcontext():
        yield "cpu"


def adapted(config: Any, device: str = "cpu", **over: Any) -> Any:
    """A model whose adapter changes it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny("llama", **{"num_hidden_layers": 2, **over}), config, "first")
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(device).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_recorded(kind: str, device: str) -> None:
    stock, model = adapted(KINDS[kind](), device), patch_with_graphs(adapted(KINDS[kind](), device))
    batch = padded_batch(2, 13)
    want = run(stock, NEW, **batch)
    assert torch.equal(run(model, NEW, **batch), want)
    if kind == "prefix" and OLD:
        # The PEFT of today gives a forward of the older Transformers more than the step's token.
        assert_fast(model, held=0)
    else:
        call = assert_looped(model)
        assert call.graphs_captured == 1 and not call.not_looped
    assert not torch.equal(want, run(tiny("llama", num_hidden_layers=2).to(device), NEW, **batch))


@pytest.mark.parametrize("kind", WAITING)
def test_adapters_that_copy_from_the_host(kind: str, device: str) -> None:
    stock, model = adapted(WAITING[kind](), device), patch_with_graphs(adapted(WAITING[kind](), device))
    batch = padded_batch(2, 13)
    want = run(stock, NEW, **batch)
    assert torch.equal(run(model, NEW, **batch), want)
    assert all("copies from the host" in reason for reason in hf_fastattn.report(model).last_call.uncaptured)
    assert hf_fastattn.report(model).last_call.uncaptured and not hf_fastattn.report(model).last_call.fallbacks
    assert not torch.equal(want, run(tiny("llama", num_hidden_layers=2).to(device), NEW, **batch))
    for each in (stock, model):
        each.merge_adapter()
    assert torch.equal(run(model, NEW, **batch), run(stock, NEW, **batch))
    assert_looped(model)


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens(kind: str, device: str) -> None:
    stock, model = adapted(PROMPTS[kind](), device), patch_with_graphs(adapted(PROMPTS[kind](), device))
    batch = padded_batch(2, 13)
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        options = {"input_ids": batch["input_ids"], "attention_mask": mask}
        assert torch.equal(run(model, NEW, **options), run(stock, NEW, **options))
        call = hf_fastattn.report(model).last_call
        assert call.fast_loops == 1 or call.not_looped


class Copies(TorchDispatchMode):
    """Notes operations on tensors of the host beside those of a device, but for single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in (*tree_leaves(args), out) if isinstance(value, torch.Tensor)]
        kinds = {value.device.type for value in tensors if value.dim()}
        if "cpu" in kinds:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, *WAITING) if kind != "prefix"])
def test_a_recording_would_take_them(kind: str) -> None:
    model = adapted({**KINDS, **WAITING}[kind]()).to("meta")
    with torch.no_grad(), Copies() as copies:
        model.base_model(input_ids=torch.ones(2, 1, dtype=torch.int64, device="meta"))
    assert bool(copies.seen) == (kind in WAITING)


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["first"] *= 0.25


def scaled_by_peft(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", 3.0)


def negated(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-1)


def stepped(model: Any) -> None:
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimiser = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    for number, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimiser.step()
    optimiser.zero_grad()


def loaded(model: Any) -> None:
    model.load_state_dict({name: value.roll(1, 0) for name, value in model.state_dict().items()})


def replaced(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.flip(0).clone()


def switched(model: Any) -> None:
    model.set_adapter("second")


def merged(model: Any) -> None:
    negated(model)
    model.merge_adapter()


def merged_and_taken_out(model: Any) -> None:
    model.merge_adapter()
    negated(model)
    model.unmerge_adapter()
    scaled(model)


def deleted(model: Any) -> None:
    model.set_adapter("second")
    model.delete_adapter("first")


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def both_active(model: Any) -> None:
    model.base_model.set_adapter(["first", "second"])


CHANGES = [
    scaled, scaled_by_peft, negated, stepped, loaded, replaced, switched, merged, merged_and_taken_out, deleted, disabled,
    both_active,
]  # fmt: skip


def with_two(device: str) -> Any:
    model = adapted(peft.LoraConfig(**{**LORA, "target_modules": SEVEN}), device)
    torch.manual_seed(6)
    model.add_adapter("second", peft.LoraConfig(**LORA, lora_alpha=16))
    return model.to(device).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: Callable[[Any], None], device: str) -> None:
    """The next call's tokens are those of a model that was never anything else."""
    model, fresh, batch = patch_with_graphs(with_two(device)), with_two(device), padded_batch(2, 13)
    before = run(model, NEW, **batch)
    change(model)
    change(fresh)
    want = run(fresh, NEW, **batch)
    for _ in range(2):
        assert torch.equal(run(model, NEW, **batch), want) and not torch.equal(want, before)
        call = assert_looped(model)
    assert call.graphs_captured == 0


def test_an_adapter_that_is_loaded(device: str, tmp_path: Path) -> None:
    other = adapted(peft.LoraConfig(**LORA, lora_alpha=16))
    negated(other)
    other.save_pretrained(str(tmp_path), selected_adapters=["first"])
    model, fresh, batch = patch_with_graphs(with_two(device)), with_two(device), padded_batch(2, 13)
    before = run(model, NEW, **batch)
    for each in (model, fresh):
        each.load_adapter(str(tmp_path / "first"), "loaded", torch_device=device)
        each.set_adapter("loaded")
        each.eval()
    want = run(fresh, NEW, **batch)
    assert torch.equal(run(model, NEW, **batch), want) and not torch.equal(want, before)
    assert_looped(model)
