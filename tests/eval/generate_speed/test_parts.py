"""What the `generate()` benchmark is made of: cases, calls, limits, targets, profiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.counters import CallCounters
from hf_fastattn.eval.choices import KINDS, SHAPES
from hf_fastattn.eval.generate_speed.bench import problems, ratios
from hf_fastattn.eval.generate_speed.cases import ENDING, ON_CPU, ON_GPU, Case, choose
from hf_fastattn.eval.generate_speed.experts import expected_experts
from hf_fastattn.eval.generate_speed.limit import key_value_bytes, step_limit, weight_bytes
from hf_fastattn.eval.generate_speed.step_profile import SHOWN, per_step, summary
from hf_fastattn.eval.generate_speed.systems import System, Timing, end_rows_after, twin
from hf_fastattn.eval.generate_speed.table import profile_table
from hf_fastattn.eval.generate_speed.targets import SHAPE, TARGETS, targets
from tests.tools.models import tiny
from tests.tools.reexecuted import reexecuted_loop


def test_rows_end_where_they_are_told_to() -> None:
    with reexecuted_loop():
        model = hf_fastattn.patch(tiny("llama"), cuda_graphs=True)
        end_rows_after(model, [3, 8])
        ids = Case("finished", 2, 24).ids(128, 0, model.device)
        for keeps_rows in (False, True):
            found = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=keeps_rows)
            tokens = found.sequences if keeps_rows else found
            assert tokens.shape == (2, 32) and tokens[0, 27:].tolist() == [0] * 5 and tokens[1, 27:].any()


def row_with(kind: str, rows: int, prompt: int, **figures: Any) -> dict[str, Any]:
    ours = {"first_ms": 100.0, "token_ms": 10.0, "peak_gb": None, **figures}
    return {"kind": kind, "rows": rows, "prompt": prompt, "systems": {"patched": ours}, "process_first_call_s": None}


def test_targets_say_what_is_reached() -> None:
    assert targets(row_with("greedy", 3, 512), SHAPE) == targets(row_with("greedy", 1, 512), None) == []
    assert [t.state for t in targets(row_with("greedy", 8, 512, token_ms=8.0), "qwen3-30b-a3b")] == ["bar reached"]
    states = {t.figure: t.state for t in targets(row_with("samples", 16, 8192, token_ms=5.0, peak_gb=25.0), SHAPE)}
    assert states == {"first_ms": "aim reached", "token_ms": "bar reached", "peak_gb": "1.25 x the bar"}
    found = {t.figure: t.value for t in targets(row_with("greedy", 16, 2048, first_ms=900.0, token_ms=5.5), SHAPE)}
    assert found == {"token_ms": 5.5, "call_65_s": pytest.approx(0.9 + 64 * 0.0055)}
    assert all(aim < bar for cases in TARGETS.values() for figures in cases.values() for bar, aim in figures.values())
    assert set(TARGETS) <= set(SHAPES) and set(TARGETS[SHAPE]) == {(case.kind, case.rows, case.prompt) for case in ON_GPU}


def test_problems_of_a_call() -> None:
    good = CallCounters(forwards=9, graphs_replayed=7)
    assert problems(good, 9, graphs=True) == []
    assert problems(CallCounters(forwards=9), 9, graphs=False) == []
    assert "no step was replayed" in problems(CallCounters(forwards=9), 9, graphs=True)[0]
    assert "8 paged forwards for 9 tokens" in problems(CallCounters(forwards=8), 9, graphs=False)[0]
    drafted = CallCounters(forwards=4, appends_replayed=2)
    assert problems(drafted, 9, graphs=True, drafts=True) == [] and len(problems(drafted, 9, graphs=True)) == 2
    assert "no step was replayed" in problems(good, 9, graphs=True, drafts=True)[0]
    good.fallbacks["a reason"] = 2
    assert problems(good, 9, graphs=True) == ["fell back: a reason (2 times)"]


def test_a_twin_shares_weights_and_nothing_else() -> None:
    model = tiny("llama")
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    hf_fastattn.patch(other)
    assert hf_fastattn.report(other).patched and not hf_fastattn.report(model).patched


def test_ratios_are_paired_unless_the_other_ran_once() -> None:
    ours = System("patched", None, 4, timings=[Timing(1, 1), Timing(2, 4), Timing(9, 9)])
    other = System("stock", None, 4, timings=[Timing(2, 1), Timing(2, 2), Timing(3, 3)])
    assert ratios(ours, other) == {"first": 1, "token": 2}
    other.timings = other.timings[:1]
    assert ratios(ours, other) == {"first": 1, "token": 4}


def test_a_call_is_timed_whole_and_leaves_the_first_token_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 0.5, 5: 2.5}
    monkeypatch.setattr(System, "seconds", lambda self, case, number, tokens, rows=None: seconds[tokens])
    system = System("stock", None, 4)
    system.measure(Case("greedy", 1, 8), 1)
    assert system.timings == [Timing(0.5, 0.5)]


def test_calls_see_other_prompts() -> None:
    case = Case("samples", 4, 30)
    first, second = (case.ids(800, number, torch.device("cpu")) for number in (0, 1))
    assert first.shape == (1, 30) and not torch.equal(first, second) and int(first.min()) >= 100
    assert torch.equal(first, case.ids(800, 0, torch.device("cpu")))
    assert case.arguments()["num_return_sequences"] == 4 and case.arguments(1)["num_return_sequences"] == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_the_table_only_as_head(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    every = sum(weight.nbytes for weight in model.parameters())
    table = model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model, 3) == (every if tied else every - table)


def test_keys_and_values_of_a_step() -> None:
    # 3 layers of 2 heads of 16 in fp32, keys and values; 4 new tokens are 2.5 on the mean.
    model, token = tiny("llama"), 2 * 2 * 16 * 4
    assert key_value_bytes(model, Case("greedy", 3, 40), 4) == 3 * 3 * 42.5 * token
    assert key_value_bytes(model, Case("samples", 3, 40), 4) == 3 * (40 + 3 * 2.5) * token
    # Rows of 3 and 5 new tokens: two steps and four.
    assert Case("finished", 2, 40).steps(4) == [2, 4]
    assert key_value_bytes(model, Case("finished", 2, 40), 4) == 3 * (41 + 42 + 41 + 42 + 43 + 44) / 4 * token
    # One layer sees everything, two a window of 24.
    assert key_value_bytes(tiny("qwen2_window"), Case("greedy", 3, 40), 4) == 3 * (42.5 + 2 * 24) * token
    weights = weight_bytes(model, 3)
    expected = (weights + 3 * 3 * 42.5 * token) / 1e9
    assert step_limit(model, Case("greedy", 3, 40), 4, 1e9) == pytest.approx(expected)


def test_a_step_reads_the_experts_that_its_tokens_are_expected_to_choose() -> None:
    model = tiny("qwen3_moe", num_experts=7, num_experts_per_tok=2)
    assert expected_experts(7, 2, 1) == pytest.approx(2) and expected_experts(7, 7, 3) == 7
    # Of 7 experts, one that a token does not choose with probability 5/7.
    assert expected_experts(7, 2, 2) == pytest.approx(7 * (1 - (5 / 7) ** 2))
    assert expected_experts(128, 8, 64) == pytest.approx(125.9, abs=0.1)
    held = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert held == 3 * 7 * (2 * 32 * 64 + 64 * 32) * 4
    every = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model, 2) == pytest.approx(every - held + held * expected_experts(7, 2, 2) / 7)


def test_a_step_is_what_the_longer_call_has_more() -> None:
    long = {"attention": (100.0, 20.0), "prompt": (50.0, 2.0), "head": (33.0, 11.0)}
    short = {"prompt": (50.0, 2.0), "head": (3.0, 1.0)}
    assert per_step(long, short, 10) == {"attention": (10.0, 2.0), "head": (3.0, 1.0)}


def test_the_profile_shows_the_longest_kernels() -> None:
    kernels = {f"k{i}": (float(i), 1.0) for i in range(1, SHOWN + 3)}
    found = summary(kernels, step_us=200.0)
    assert [k["name"] for k in found["kernels"]] == [f"k{i}" for i in range(SHOWN + 2, 2, -1)]
    assert found["other_us"] == 3.0 and found["sum_us"] == sum(range(1, SHOWN + 3))
    text = profile_table({"rows": 1, "prompt": 8, **found})
    assert "| 17.0 | 1.0 | `k17` |" in text and f"| {200 - found['sum_us']:.1f} | | gaps" in text


def test_chosen_cases() -> None:
    assert choose(None, None, None, on_gpu=True) == list(ON_GPU)
    assert choose(["samples"], None, None, on_gpu=False) == [case for case in ON_CPU if case.kind == "samples"]
    assert choose(None, [1, 16], [512, 2048], on_gpu=True) == [Case("greedy", 1, 512), Case("greedy", 16, 2048)]
    assert choose(["samples"], [4, 8], [64], on_gpu=True) == [Case("samples", 4, 64), Case("samples", 8, 64)]
    for device in (True, False):
        for kind in set(KINDS) - {*ENDING, "drafts"}:
            assert choose([kind], None, None, on_gpu=device)
    with pytest.raises(ValueError, match="give --batch 1"):
        choose(["drafts"], [2], None, on_gpu=False)
    ids = Case("drafts", 1, 20).ids(64, 0, torch.device("cpu"))
    assert ids.shape == (1, 20) and torch.equal(ids[:, :3], ids[:, 3:6])
