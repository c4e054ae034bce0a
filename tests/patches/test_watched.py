"""Who looks at hidden states from outside sees the batch as stock shows it: padded, and no rows merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.patches.snapshots import generate
from tests.tools.models import assert_fast, padded_batch, pair, real_tokens, tiny

WIDTH = 64
PLACES = {
    "decoder": lambda model: model.model,
    "layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[1].self_attn,
    "mlp": lambda model: model.model.layers[1].mlp,
    "projection": lambda model: model.model.layers[1].self_attn.o_proj,
}


def steer(vectors: torch.Tensor, shapes: list[tuple[int, ...]]) -> Any:
    """A hook that adds one of `vectors [B, 1, hidden]` to each row, and notes the shape that it sees."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple | dict) else out
        shapes.append(tuple(hidden.shape))
        hidden = hidden + vectors[: hidden.shape[0]]
        if isinstance(out, dict):
            out.last_hidden_state = hidden
            return out
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return hook


def equal_rows(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = padded_batch(1, 20)["input_ids"].expand(rows, -1).contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(model: Any, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=8, do_sample=False, **kwargs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", [padded_batch(), equal_rows()], ids=["padded", "equal"])
def test_a_hook_sees_what_it_sees_in_stock(place: str, batch: dict[str, torch.Tensor]) -> None:
    vectors = 2 * torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    results, seen = [], []
    for model in pair("llama"):
        shapes: list[tuple[int, ...]] = []
        PLACES[place](model).register_forward_hook(steer(vectors, shapes))
        results.append(run(model, batch))
        seen.append(shapes)
    assert torch.equal(*results) and seen[0] == seen[1]
    assert_fast(model, fallbacks=("has hooks",))


def test_a_hook_does_not_stop_what_needs_no_layout() -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        side.model.layers[1].register_forward_hook(steer(torch.ones(1, 1, WIDTH), []))
    batch = padded_batch(1)
    assert torch.equal(run(model, batch), run(stock, batch))
    assert_fast(model, real_tokens(batch))


def test_a_wrapped_forward_sees_what_it_sees_in_stock() -> None:
    results = []
    for model in pair("llama"):
        layer = model.model.layers[1]
        original = layer.forward

        def wrapped(hidden: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            hidden = hidden.clone()
            hidden[:, -1] += 1.0
            return original(hidden, *args, **kwargs)

        layer.forward = wrapped
        results.append(run(model, padded_batch()))
    assert torch.equal(*results)
    assert_fast(model, fallbacks=("padding stays: the forward of a LlamaDecoderLayer was replaced",))


class Centred(torch.nn.Module):
    """A module of a user's own that mixes a row's tokens."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - 0.5 * x.mean(1, keepdim=True))


def test_a_module_of_a_users_own_sees_what_it_sees_in_stock() -> None:
    results = []
    for model in pair("llama"):
        model.model.layers[1].mlp = Centred(model.model.layers[1].mlp)
        results.append(run(model, padded_batch()))
    assert torch.equal(*results)
    assert_fast(model, fallbacks=("Centred may look at the whole batch",))


def with_two_adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, config)
    wrapped.add_adapter("other", copy.copy(config))
    return wrapped.eval()


@pytest.mark.parametrize("batch", [padded_batch(), equal_rows()], ids=["padded", "equal"])
def test_an_adapter_for_each_row(batch: dict[str, torch.Tensor]) -> None:
    stock, model = with_two_adapters(tiny("llama")), hf_fastattn.patch(with_two_adapters(tiny("llama")))
    names = ["other", "default", "__base__"]
    assert torch.equal(run(model, batch, adapter_names=names), run(stock, batch, adapter_names=names))
    assert_fast(model.get_base_model(), fallbacks=("has hooks",))
    assert torch.equal(run(model, batch), run(stock, batch))
    assert_fast(model.get_base_model())


def test_dropout_is_drawn_for_every_sample() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(7)
    model = hf_fastattn.patch(peft.get_peft_model(tiny("llama"), config)).train()
    result = model.generate(
        **equal_rows(1), max_new_tokens=1, num_return_sequences=6, do_sample=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    first = result.logits[0]
    assert min((first[0] - first[row]).abs().max() for row in range(1, 6)) > 1e-3
    assert_fast(model.get_base_model(), 6 * 20, fallbacks=("dropout is drawn for every row",), held=None)
    model.eval()
    model.generate(**equal_rows(1), max_new_tokens=1, num_return_sequences=6, do_sample=True)
    assert_fast(model.get_base_model(), 20, held=None)


def test_activations_that_are_scaled_together() -> None:
    """Dynamic int8: one scale for all tokens of a batch, padding too."""
    results = []
    for model in (tiny("llama"), hf_fastattn.patch(tiny("llama"))):
        torch.ao.quantization.quantize_dynamic(model.model.layers[1].mlp, {torch.nn.Linear}, torch.qint8, inplace=True)
        results.append(generate(model))
    assert torch.equal(*results)
    assert_fast(model, fallbacks=("scales activations by the whole batch",))
