"""LoRA layers in Triton's interpreter: fused where they are plain, called where they are more, always as PEFT computes."""

from __future__ import annotations

import copy
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_fastattn
from tests.kernels.cases import assert_close
from tests.tools.fused_layers import LAYER_COUNT, assert_logits, build, count_launches, expected, steps

peft = pytest.importorskip("peft")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q_AND_V = ["q_proj", "v_proj"]
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


def wrap(model: Any, targets: list[str], **options: Any) -> Any:
    """The model with an adapter that changes it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config).eval()


def fused_and_logits(model: Any, cuts: tuple[int, ...] = (3, 4)) -> tuple[int, torch.Tensor]:
    """LoRA layers fused in a forward, on average, and the logits."""
    base = model.get_base_model()
    counters = base._fastattn.runtime.counters
    before, cache = counters.adapters_fused, hf_fastattn.PagedCache(base.config)
    out = torch.cat(steps(base, IDS[:, : cuts[-1]], None, list(cuts), cache), 1)
    fused = counters.adapters_fused - before
    assert not counters.fallbacks and not fused % len(cuts)
    return fused // len(cuts), out


def check(stock: Any, model: Any, fused: int, cuts: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    count, out = fused_and_logits(model, cuts)
    assert count == fused
    # A copy, since another implementation of attention is asked of it.
    assert_logits("lora", copy.deepcopy(stock.get_base_model()), out, IDS[:, : cuts[-1]], None, list(cuts))
    return out


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "targets"), [("llama", SEVEN), ("qwen2", Q_AND_V)])
def test_logits(name: str, targets: list[str], launched: Counter[str]) -> None:
    stock, model = wrap(build(name), targets), wrap(hf_fastattn.patch(build(name)), targets)
    check(stock, model, LAYER_COUNT * len(targets))
    # As many launches as without adapters.
    assert dict(launched) == {kernel: 2 * count for kernel, count in expected(2).items()}


@pytest.mark.interpreter
@pytest.mark.parametrize("cast", [True, False])
def test_adapters_of_a_model_in_bf16(cast: bool) -> None:
    """PEFT keeps A and B in fp32 unless it is told not to."""
    models = [wrap(build("llama").bfloat16(), SEVEN) for _ in range(2)]
    for model in models:
        if not cast:
            model.bfloat16()
    dtypes = {
        type(module): module.lora_A.default.weight.dtype for module in models[0].modules() if hasattr(module, "lora_A")
    }
    assert set(dtypes.values()) == {torch.float32 if cast else torch.bfloat16}
    stock, model = models[0], hf_fastattn.patch(models[1])
    count, out = fused_and_logits(model)
    assert count == 7 * LAYER_COUNT
    exact = copy.deepcopy(stock).double()
    exact.get_base_model().model.rotary_emb.double()
    with torch.no_grad():
        assert_close("lora", out, stock(IDS).logits, exact(IDS).logits)


@pytest.mark.interpreter
def test_many_tokens_call_the_layers() -> None:
    model = wrap(hf_fastattn.patch(build("llama")), SEVEN)
    base = model.get_base_model()
    ids = torch.arange(1, 21)[None]
    out = steps(base, ids, None, [20], hf_fastattn.PagedCache(base.config))[0]
    assert base._fastattn.runtime.counters.adapters_fused == 0
    assert_logits("lora", copy.deepcopy(wrap(build("llama"), SEVEN).get_base_model()), out, ids, None, [20])


def q_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def bias_on_b(model: Any) -> None:
    inner = q_of(model).lora_B
    inner["default"] = nn.Linear(4, inner["default"].out_features)
    nn.init.constant_(inner["default"].weight, 0.1)
    nn.init.constant_(inner["default"].bias, 0.5)


def hook_on_a(model: Any) -> None:
    q_of(model).lora_A["default"].register_forward_hook(lambda module, given, out: 1.5 * out)


def own_forward(model: Any) -> None:
    inner = q_of(model).lora_A["default"]
    inner.forward = types.MethodType(lambda self, x: 1.5 * nn.Linear.forward(self, x), inner)


def two_active(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def wide(model: Any) -> None:
    model.add_adapter("wide", peft.LoraConfig(r=130, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["wide"])


# What is done to a model of 3 LoRA layers in each of 2 (q, v, o), and how many are still fused.
CALLED: dict[str, tuple[Callable[[Any], object], int]] = {
    # One of q, k and v that is not plain makes all three called.
    "bias": (bias_on_b, 4),
    "hook on the layer": (lambda model: q_of(model).register_forward_hook(lambda module, given, out: 1.5 * out), 4),
    "hook on A": (hook_on_a, 4),
    "forward of A": (own_forward, 4),
    "transposed B": (
        lambda model: setattr(q_of(model).lora_B["default"], "weight", nn.Parameter(torch.ones(4, 64).T * 0.1)), 4
    ),
    "two adapters": (two_active, 2),
    "large rank": (wide, 0),
    "merged": (lambda model: model.merge_adapter(), 0),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLED)
def test_layers_that_are_more_are_called(name: str) -> None:
    change, fused = CALLED[name]
    targets = [*Q_AND_V, "o_proj"]
    stock, model = wrap(build("llama"), targets), wrap(hf_fastattn.patch(build("llama")), targets)
    for each in (stock, model):
        torch.manual_seed(6)
        change(each)
    check(stock, model, fused, (2,))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_variants(options: dict[str, Any]) -> None:
    stock, model = (wrap(build("llama, biases"), SEVEN, **options) for _ in range(2))
    hf_fastattn.patch(model)
    check(stock, model, 7 * LAYER_COUNT if "use_rslora" in options else 0, (2,))


@pytest.mark.interpreter
def test_dropout() -> None:
    """In train mode it draws for every layer that is called; else it passes."""
    stock, model = (wrap(build("llama"), ["o_proj"], lora_dropout=0.5) for _ in range(2))
    hf_fastattn.patch(model)
    check(stock, model, LAYER_COUNT, (2,))
    for each in (stock, model):
        each.train()
    torch.manual_seed(1)
    count, out = fused_and_logits(model, (4,))
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(out, stock(IDS).logits, rtol=1e-4, atol=1e-4)
    assert count == 0


@pytest.mark.interpreter
def test_another_library_of_adapters() -> None:
    config = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"], "init_ia3_weights": False}
    stock, model = (peft.get_peft_model(build("llama"), peft.IA3Config(**config)).eval() for _ in range(2))
    model.load_state_dict(stock.state_dict())
    hf_fastattn.patch(model)
    check(stock, model, 0, (2,))


@pytest.mark.interpreter
def test_adapters_that_change() -> None:
    """Every change is seen by the next forward, as by that of a model that never had another."""
    stock, model = wrap(build("llama"), Q_AND_V), hf_fastattn.patch(wrap(build("llama"), Q_AND_V))
    second = peft.LoraConfig(r=3, lora_alpha=32, target_modules=SEVEN, init_lora_weights=False)
    outs = [check(stock, model, 4, (2,))]

    def changed(change: Callable[[Any], object], fused: int) -> None:
        for each in (stock, model):
            torch.manual_seed(9)
            change(each)
        outs.append(check(stock, model, fused, (2,)))
        assert all(not torch.equal(outs[-1], out) for out in outs[:-1])

    def scale(each: Any) -> None:
        q_of(each).scaling["default"] *= 3

    def weights(each: Any) -> None:
        with torch.no_grad():
            q_of(each).lora_B["default"].weight.mul_(-1)

    changed(scale, 4)
    changed(weights, 4)
    changed(lambda each: (each.add_adapter("second", second), each.set_adapter("second")), 14)
    changed(lambda each: (each.set_adapter("default"), q_of(each).set_scale("default", 5.0)), 4)
    with stock.disable_adapter(), model.disable_adapter():
        changed(lambda each: None, 0)
    changed(lambda each: (each.set_adapter("second"), each.delete_adapter("default"), scale_second(each)), 14)


def scale_second(each: Any) -> None:
    q_of(each).scaling["second"] *= 0.5
