"""Every file of examples/ runs on what is shipped, and does what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn import interface
from hf_fastattn.eval.choices import SHIPPED

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LONGEST = 65


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What the file left in its variables."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def stock_tokens(ids: torch.Tensor, count: int) -> torch.Tensor:
    """`ids` and `count` greedy tokens of the shipped checkpoint, without any of our code."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(ids.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)


def test_one_line_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("one_line_patch.py", monkeypatch)
    call = left["report"].last_call
    assert torch.equal(left["fast"], left["stock"]) and left["fast"].shape[1] > left["inputs"].input_ids.shape[1]
    assert call.forwards > 0 and not call.fallbacks
    assert not left["after"].patched and "_fastattn" not in vars(left["model"])


def test_n_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("n_samples.py", monkeypatch)
    call, prompt = left["call"], left["prompt"]
    assert call.prompt_tokens == prompt and not call.fallbacks
    # All pages of the prompt have seven more owners, and all samples but the last copy the partial one.
    assert call.pages_shared >= (left["samples"] - 1) * (prompt // 16) > 0 and call.pages_copied > 0
    assert left["tokens"].shape[0] == left["samples"] and len(set(map(tuple, left["tokens"].tolist()))) > 1


def test_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("chat.py", monkeypatch)
    tokenizer, history = AutoTokenizer.from_pretrained(SHIPPED), left["history"]
    messages = [len(tokenizer(message, add_special_tokens=not at).input_ids) for at, message in enumerate(left["messages"])]
    # From the second turn on the last token of the turn before is computed too, which was chosen and not fed.
    assert left["computed"] == [messages[0], messages[1] + 1, messages[2] + 1]
    assert torch.equal(stock_tokens(history[:, :-16], 16), history)


def test_best_of_n(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("best_of_n.py", monkeypatch)
    assert left["computed"] == left["SAMPLES"]
    assert not hf_fastattn.report(left["model"]).pages_in_use
    # What forks have computed is what a model of Transformers' own does.
    stock = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(left["device"])
    logits = stock(left["texts"]).logits.log_softmax(-1)[:, left["prompt"].shape[1] - 1 : -1]
    expected = logits.gather(2, left["new"][..., None])[..., 0].mean(1)
    assert torch.allclose(left["scores"], expected, atol=1e-4) and len(set(left["scores"].tolist())) > 1


def test_self_consistency(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("self_consistency.py", monkeypatch)
    assert sum(left["votes"].values()) == left["WAYS"] and not hf_fastattn.report(left["model"]).pages_in_use
    stock = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(left["device"])
    whole = torch.cat((left["ways"].sequences, left["ask"].expand(left["WAYS"], -1)), 1)
    assert torch.equal(stock(whole).logits[:, -1].argmax(-1), left["answers"])


def test_beam_of_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("beam_of_thoughts.py", monkeypatch)
    assert len(left["kept"]) == left["DEPTH"] and not hf_fastattn.report(left["model"]).pages_in_use
    stock = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(left["device"])
    judged = torch.cat((left["texts"], left["judge"].expand(left["WIDTH"], -1)), 1)
    expected = stock(judged).logits[:, -1].log_softmax(-1)[:, left["good"]]
    assert torch.allclose(expected, torch.tensor(left["kept"][-1], device=left["device"]), atol=1e-4)


def test_attn_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    interface.counters.reset()
    left = run("attn_implementation.py", monkeypatch)
    # So small a model gains nothing from our kernels on a CPU.
    calls = interface.counters.kernels if torch.cuda.is_available() else interface.counters.fallbacks
    assert sum(calls.values()) >= 3 * 24
    assert torch.equal(left["fast"], left["stock"])
    assert interface.counters.batches["decode: pages in place"] >= 23


def test_own_decode_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("own_decode_loop.py", monkeypatch)
    for prompt, new in zip(left["prompts"], torch.stack(left["tokens"], 1).tolist(), strict=True):
        ids = torch.tensor([prompt], device=left["device"])
        assert stock_tokens(ids, left["STEPS"])[0].tolist() == prompt + new


def test_rollout_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("rollout_in_training.py", monkeypatch)
    assert left["fallbacks"] == [{}, {}, {}] and all(0 < kept <= 2**27 for kept in left["kept"])
    model, prompt, before = left["model"], left["inputs"].input_ids, AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert not torch.equal(model.lm_head.weight.cpu(), before.lm_head.weight.float())
    # Nothing is computed with the weights of before.
    ours = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert hf_fastattn.report(model).last_call.forwards == 16
    hf_fastattn.unpatch(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), ours)


def test_alibi_retrofit(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("alibi_retrofit.py", monkeypatch)
    ids, call = left["inputs"].input_ids, hf_fastattn.report(left["model"]).last_call
    assert torch.equal(stock_tokens(ids, 24), left["without"]) and not torch.equal(left["with_alibi"], left["without"])
    assert call.forwards == 24 and not call.fallbacks
    assert hf_fastattn.report(left["model"]).variants == ("layers 0 to 2: score_mod=alibi",)


def test_learned_distance_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("learned_distance_bias.py", monkeypatch)
    assert left["losses"][-1] < left["losses"][0] - 0.1
    # The bias was found for what attention computes: without it the loss is as before.
    left["table"].zero_()
    assert abs(left["loss"]() - left["losses"][0]) < 1e-4


def test_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("packed_documents.py", monkeypatch)
    assert (left["together"] - left["alone"]).abs().max() < 1e-3
    assert torch.equal(left["continued"][0, -16:], left["continued_alone"][0, -16:])


def test_sinks_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("sinks_and_window.py", monkeypatch, "--window", "32")
    tokens, first = left["tokens"], left["inputs"].input_ids.shape[1]
    stock = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(tokens.device)
    distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
    seen = (distance >= 0) & ((distance < 32) | (torch.arange(tokens.shape[1]) < 4))
    with torch.no_grad():
        logits = stock(tokens, attention_mask=seen[None, None].to(tokens.device)).logits
    assert torch.equal(logits[0, first - 1 : -1].argmax(-1), tokens[0, first:])


def test_generation_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("generation_without_end.py", monkeypatch, "--new", "120", "--window", "32")
    call, report = hf_fastattn.report(left["model"]).last_call, hf_fastattn.report(left["model"])
    assert left["tokens"].shape[1] == left["inputs"].input_ids.shape[1] + 120
    # Of 16 tokens each: one of sinks, two of the window, one that makes place.
    assert max(left["held"]) == 4 and call.pages_allocated == 4 and not call.fallbacks and not report.pages_in_use


def test_evaluate_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    left = run("evaluate_in_batches.py", monkeypatch)
    stock = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(left["device"])
    plain = HFLM(pretrained=stock, tokenizer=AutoTokenizer.from_pretrained(SHIPPED), batch_size=5)
    # It writes to the options that it is given.
    asked = {"until": ["\n", ". "], "max_gen_toks": 32}
    for request in left["requests"]:
        request.arguments = (request.args[0], dict(asked))
    assert left["answers"] == plain.generate_until(left["requests"]) and len(set(left["answers"])) > 3
    call, report = left["call"], hf_fastattn.report(left["model"])
    assert 0 < call.batch_steps < 32 and not call.not_looped and not call.fallbacks and report.pages_in_use == 0
    assert call.prompt_tokens > 0 and call.batch_steps < sum(map(len, left["answers"]))


def test_every_example_is_tested_and_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert files and not [path.name for path in files if f"test_{path.stem}" not in globals()]
    assert not [path.name for path in files if len(path.read_text().splitlines()) > LONGEST]
