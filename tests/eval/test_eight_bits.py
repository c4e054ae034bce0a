"""The benchmark of 8-bit keys and values: the check before a figure, its lines, and the table of a record."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.eval import eight_bits
from hf_fastattn.eval.attention import our_launch
from hf_fastattn.eval.choices import KV_DTYPES
from hf_fastattn.eval.kernel_speed.attention_cases import Shape, make_inputs
from hf_fastattn.eval.kernel_speed.eight_bit_cases import agrees, quantised
from hf_fastattn.kernels.page_formats import page_scales
from tests.tools.models import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_wrong_result_is_seen(kv_dtype: str) -> None:
    inputs = quantised(make_inputs(Shape("decode", "2 x 40", (40, 40), (1, 1)), 16, CPU, torch.float32), kv_dtype)
    out = our_launch(inputs)(0)[0]  # type: ignore[index]
    assert agrees(inputs, out)
    page_scales(inputs.k_pages[0])[:, 1, :, 0] *= 1.1
    assert not agrees(inputs, out)


def test_a_line_and_the_table() -> None:
    row = eight_bits.measure_decode(2, 32, list(KV_DTYPES), CPU, 1, 1e9)
    assert all(row["agrees"].values()) and set(row["us"]) == {"16 bits", *KV_DTYPES}
    system = {"first_s": 1.0, "token_s": 0.5, "allocator_bytes": 2**20, "peak": None}
    found = {"shape": "s", "layers": 1, "rows": 2, "prompt": 3, "new": 4, "systems": {"16 bits": system, "fp8": system}}
    row["agrees"]["int8"] = False
    record = {"decode": [row], "append": [{"tokens": 8, "us": dict.fromkeys(row["us"], 1.0)}], "generate": [found]}
    shown = eight_bits.table(record, list(KV_DTYPES))
    assert "| 2 x 32 |" in shown and shown.count("WRONG") == 1 and "| fp8 | 1000.00 | 1.000 |" in shown


def test_a_call_gives_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "random_model", lambda *arguments: tiny("llama"))
    calls: list[tuple[float, eight_bits.Timing]] = []
    timed_call, seconds = eight_bits.timed_call, eight_bits.System.seconds

    def noted_seconds(*arguments: object) -> float:
        calls.append((seconds(*arguments), eight_bits.Timing(0.0, 0.0)))  # type: ignore[arg-type]
        return calls[-1][0]

    def noted_call(system: eight_bits.System, *arguments: object) -> eight_bits.Timing:
        timing = timed_call(system, *arguments)  # type: ignore[arg-type]
        calls[-1] = calls[-1][0], timing
        assert "_prefill" not in vars(system.model)
        return timing

    monkeypatch.setattr(eight_bits.System, "seconds", noted_seconds)
    monkeypatch.setattr(eight_bits, "timed_call", noted_call)
    found = eight_bits.measure_generate(2, 2, 40, 6, 2, ["fp8"], CPU)
    # One call to warm up and two that count, of each.
    assert len(calls) == 6
    for whole, timing in calls:
        assert 0 < timing.first < whole and timing.first + 6 * timing.token == pytest.approx(whole)
    assert found["systems"]["fp8"]["page_bytes"] < found["systems"]["16 bits"]["page_bytes"]
    assert not any(system["fallbacks"] for system in found["systems"].values())
