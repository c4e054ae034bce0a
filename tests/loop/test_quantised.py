"""Models with quantised weights in the device's loop: stock's tokens, from our kernels or from the library's, captured.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`), with PyTorch's versions of
the kernels (`fused_in_torch`), or with these in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.models import padded_batch, patch_with_graphs, single
from tests.tools.quantised_models import FOUR_BITS, SIZES, quantised
from tests.tools.reexecuted import reexecuted_loop

KINDS = (*FOUR_BITS, "int8")
# The interpreter is slow.
NEW = 3 if os.environ.get("TRITON_INTERPRET") == "1" else 12
# Projections of a model.
LAYERS = 7 * SIZES["num_hidden_layers"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with reexecuted_loop(), fused_in_torch():
        yield "cpu"


def both(kind: str, device: str, **over: Any) -> tuple[Any, Any]:
    return quantised(kind, device, **over), patch_with_graphs(quantised(kind, device, **over))


def steps(device: str) -> int:
    """Steps that are launched from Python: on a GPU the warm-up and the capture."""
    return 2 if device == "cuda" else NEW - 1


@pytest.mark.interpreter
def test_in_the_interpreter() -> None:
    """With 8 bits: codes of 4 are looked up there by comparisons, which takes minutes."""
    with reexecuted_loop():
        stock, model = both("int8", "cpu")
        assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
        assert assert_looped(model).quantised_products


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_takes_our_kernels(device: str, kind: str) -> None:
    stock, model = both(kind, device)
    assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
    call = assert_looped(model)
    assert call.graphs_captured == 1 and call.quantised_products >= LAYERS * steps(device)
    assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
    assert assert_looped(model).graphs_captured == 0


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_take_the_librarys(device: str, kind: str) -> None:
    stock, model = both(kind, device)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert assert_looped(model).graphs_captured == 1


@pytest.mark.parametrize("rows", [2, 6, 16])
def test_several_rows_of_four_bits_in_bf16(device: str, rows: int) -> None:
    """Up to 16 rows take our kernel; the tokens are those of our own layers, uncaptured."""
    model = patch_with_graphs(quantised("nf4", device, torch.bfloat16))
    plain = hf_fastattn.patch(quantised("nf4", device, torch.bfloat16), cuda_graphs=False)
    batch = padded_batch(rows)
    got = run(model, NEW, **batch)
    assert assert_looped(model).quantised_products >= LAYERS * steps(device)
    want = run(plain, NEW, **batch)
    assert got.shape == want.shape and torch.equal(got[:, :37], want[:, :37])
    assert (got == want).float().mean() > 0.7


@pytest.mark.parametrize("rows", [1, 3])
def test_outliers_are_looked_for_layer_by_layer(device: str, rows: int) -> None:
    """LLM.int8 asks the host in each layer whether there are any: nothing is captured, and the report says why."""
    stock, model = both("LLM.int8", device, dtype=torch.float32 if device == "cpu" else torch.float16)
    given = single() if rows == 1 else {}
    assert torch.equal(run(model, NEW, **given), run(stock, NEW, **given))
    call = hf_fastattn.report(model).last_call
    assert not call.graphs_captured and not call.quantised_products
    assert all(reason.startswith("padding stays") for reason in call.fallbacks)
    assert any("Linear8bitLt may do more than launch kernels" in reason for reason in call.not_looped)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hidden", [128, 1024])
def test_tiles_of_four_bits_are_captured(rows: int, hidden: int) -> None:
    """By our kernel, or by tinygemm's own where columns are padded; torchao packs its tiles on a GPU alone."""
    stock, model = both("int4", "cuda", dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=2 * hidden)
    given = single() if rows == 1 else {}
    run(model, NEW, **given)
    call = assert_looped(model)
    assert call.graphs_captured == 1 and call.quantised_products == (2 * LAYERS if hidden == 1024 else 0)
    assert (run(model, NEW, **given) == run(stock, NEW, **given)).float().mean() > 0.7


def test_rows_of_broken_blocks_are_called(device: str) -> None:
    """Blocks go on from one row to the next where a row is no multiple of them."""
    stock, model = both("nf4", device, intermediate_size=96)
    assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
    call = assert_looped(model)
    # Those of down, whose rows have 96 columns.
    assert call.quantised_products * 7 == call.quantised_products // 6 * 6 * 7 and call.quantised_products


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_change_are_read(device: str, kind: str) -> None:
    """In place by a replay; others by another recording."""
    stock, model = both(kind, device)
    run(model, NEW, **single())
    for each in (stock, model):
        for layer in each.model.layers:
            weight = layer.mlp.down_proj.weight
            scales = weight.quant_state.state2.absmax if kind == "nf4" else weight.scale
            scales.mul_(-1.5)
    want = run(stock, NEW, **single())
    assert torch.equal(run(model, NEW, **single()), want)
    assert assert_looped(model).graphs_captured == 0
    for each in (stock, model):
        mlp = each.model.layers[0].mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    other = run(stock, NEW, **single())
    assert not torch.equal(other, want)
    assert torch.equal(run(model, NEW, **single()), other)
    assert assert_looped(model).graphs_captured == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_lora_over_four_bits(device: str, rows: int) -> None:
    """QLoRA: PEFT's layers are called, and captured."""
    peft = pytest.importorskip("peft")

    def lora(model: Any) -> Any:
        torch.manual_seed(4)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config).eval()

    stock, model = lora(quantised("nf4", device)), lora(quantised("nf4", device))
    patch_with_graphs(model)
    given = single() if rows == 1 else {}
    want = run(stock, NEW, **given)
    assert torch.equal(run(model, NEW, **given), want)
    call = assert_looped(model)
    assert call.graphs_captured == 1 and bool(call.quantised_products) == (rows == 1)
    stock.disable_adapter_layers()
    assert not torch.equal(run(stock, NEW, **given), want)


def test_a_hook_on_a_quantised_layer_is_seen(device: str) -> None:
    stock, model = both("nf4", device)
    seen: list[Any] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(None))
    assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
    assert len(seen) >= NEW
    assert hf_fastattn.report(model).last_call.fast_loops == 0
