"""Evaluations of the device's loop where it is recorded: CUDA graphs, our kernels, 16 and 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import fault_table, models
from hf_fastattn.eval.accuracy import texts, windows
from hf_fastattn.eval.accuracy.bitwise import layers_apart
from hf_fastattn.eval.choices import STEP_FAULTS

pytestmark = pytest.mark.gpu

SIZE = ["--device", "cuda", "--quiet", "--context", "128", "--stride", "48", "--windows", "8", "--batch", "8"]
FED = ["--append", "20", "--piece", "7", "--decode", "12"]
VARIANTS = ["--variant", "backend=triton,loop=on,share=on", "--variant", "backend=triton,loop=on,share=off"]
ALONE = ["--variant", "backend=triton,loop=on,alone=on"]
OPTIONS = {"perplexity": [], "parity": ["--new", "16"], "logprobs": ["--new", "16", "--samples", "4"]}


def evaluate(name: str, *more: str) -> dict[str, Any]:
    return fault_table.evaluate(name, [*SIZE, *FED, *OPTIONS[name], *more])


ADDS_UP_AS_NO_FORWARD_DOES = (
    "in 16 bits a step's products add up in another order than any forward's, which draws most of the rounding error anew; "
    "stock's two ways share theirs (docs/decisions/log-probabilities-in-16-bits.md)"
)
ADDS_UP_ELSEWHERE = "fp32 products add up in an order that depends on the tile's height, which a decode step has another of"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (name, dtype)
            for name in OPTIONS
            for dtype in ("bfloat16", "float32")
            if (name, dtype) != ("logprobs", "bfloat16")
        ),
        pytest.param("logprobs", "bfloat16", marks=pytest.mark.xfail(reason=ADDS_UP_AS_NO_FORWARD_DOES, strict=True)),
    ],
)
def test_green_from_replays(name: str, dtype: str) -> None:
    record = evaluate(name, "--dtype", dtype, *VARIANTS, *ALONE)
    assert record["verdict"] == "green", [check for check in record["checks"] if check["alarms"]]
    checks = {check["name"] for check in record["checks"]}
    assert {"batches off the device's loop", "batches whose prefixes were read row by row"} <= checks


@pytest.mark.parametrize("fault", [fault for fault in STEP_FAULTS if fault != "step-sampler"])
def test_faults_in_graphs_are_caught(fault: str) -> None:
    if fault == "step-expert" and not models.MIXTURE.exists():
        pytest.skip("the small mixture is not in a wheel")
    model = ["--model", str(models.MIXTURE)] if fault == "step-expert" else []
    # The page behind a prefix has to be full before it can be read in place of another.
    longer = ["--new", "24"] if fault == "step-suffix" else []
    for name in ("perplexity", "logprobs"):
        more = longer if name == "logprobs" else []
        record = evaluate(name, "--dtype", "float32", *VARIANTS[:2], *model, *more, "--inject", fault)
        assert fault_table.caught(fault_table.row(name, record, fault, 0, None)) and record["planted"] > 0, name


@pytest.mark.parametrize("fault", ["step-page", "step-slot", "step-scale", "step-length", "step-rope"])
def test_faults_in_graphs_of_one_row_are_caught(fault: str) -> None:
    """What the launches for a single row read: its page table, its slot, its length, the scale, its angles."""
    for name in ("perplexity", "logprobs"):
        record = evaluate(name, "--dtype", "float32", *ALONE, "--inject", fault)
        assert fault_table.caught(fault_table.row(name, record, fault, 0, None)) and record["planted"] > 0, name


def test_rows_alone_take_the_launch_for_one_short_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastattn.kernels.attention import short_row as module

    launch, seen = module.short_row, list[int]()

    def noted(q: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        seen.append(len(q))
        return launch(q, *given, **named)

    monkeypatch.setattr(module, "short_row", noted)
    record = evaluate("perplexity", "--dtype", "bfloat16", *ALONE)
    config = models.load(str(models.SHIPPED), torch.bfloat16, "cuda")[0].config
    shapes = (1, config.num_attention_heads, config.head_dim), (1, 16, config.num_key_value_heads, config.head_dim)
    takes = module.takes(*(torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes))
    assert record["verdict"] == "green" and bool(seen) == takes and set(seen) <= {1}


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.xfail(reason=ADDS_UP_ELSEWHERE, strict=True))]
)
def test_attention_is_equal_to_the_bit_in_every_layer(dtype: str) -> None:
    model, tokenizer = models.load(str(models.SHIPPED), getattr(torch, dtype), "cuda")
    chosen = windows.choose(texts.documents(), tokenizer, context=512, stride=128, count=6, seed=2)
    batch = windows.batches(chosen, 6, pad=2)[0]
    with hf_fastattn.patched(model, batch_invariant=True):
        assert layers_apart(model, batch) == [0.0] * model.config.num_hidden_layers
        assert not hf_fastattn.report(model).last_call.fallbacks


def test_in_batch_invariant_mode_no_more_remains_than_between_stocks_two_ways() -> None:
    record = evaluate("logprobs", "--dtype", "bfloat16", "--variant", "backend=triton,batch_invariant=on,share=on")
    (found,) = record["remains"].values()
    stock = next(row for row in record["series"] if row["series"] == "stock")
    assert found["apart"] == 0 and found["rms"] <= stock["rms"]
    checks = {check["name"]: check["alarms"] for check in record["checks"]}
    assert not checks["decode less a forward over our pages, rms"]
