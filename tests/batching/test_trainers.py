"""Trainers that have a running batch generate: TRL's `use_transformers_continuous_batching`, and accelerate's wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.autocast import region_dtype
from hf_fastattn.batching.engine import Engine
from hf_fastattn.eval.choices import SHIPPED
from tests.batching.served import NEW, Twins, prompts
from tests.batching.test_manager import greedy
from tests.tools.accelerator import own_accelerator

SAMPLES, COUNT, LENGTH = 4, 2, 8
# Of scores whose standard deviation is 2.4; of a wrong token 4 and more.
ROUNDING = 0.15
TEXTS = ["The cat", "One day a little girl went", "It was late", "Tim and his dog saw a big"]


def shortfall(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """How far the scores of greedy tokens stay below the best ones, at most, in a forward without a cache."""
    scores = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
    chosen = scores.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    return float((scores.amax(dim=1) - chosen).max())


def test_the_autocast_of_accelerate(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps compute in its dtype, as generate() does; weights are fp32."""
    twins, given = Twins("llama", device), prompts(4)
    plain, regions = Engine.run, set()
    monkeypatch.setattr(Engine, "run", lambda self: (regions.add(region_dtype(twins.model.device)), plain(self))[1])
    with own_accelerator():
        accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
        model = accelerator.unwrap_model(accelerator.prepare(twins.model), keep_fp32_wrapper=True)
        outputs = model.generate_batch(given, generation_config=greedy())
        call = hf_fastattn.report(model).last_call
        assert call.requests_batched == 4 and not call.not_looped and not call.fallbacks
        assert regions == {torch.bfloat16}
        for prompt, output in zip(given, outputs.values(), strict=True):
            ids = torch.tensor([prompt], device=model.device)
            alone = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
            assert output.error is None and len(output.generated_tokens) == len(alone)
            # On a GPU the sums of a batch are others, and scores that are nearly equal may change places in 16 bits.
            assert output.generated_tokens == alone or device != "cpu"
            with torch.no_grad():
                assert shortfall(twins.stock, prompt, output.generated_tokens) < ROUNDING


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [len(text) / 10 for text in completions]


def trained(folder: Path, patched: bool, bf16: bool = False) -> tuple[list[list[int]], dict[str, float], Any]:
    """The completions of one step of GRPO, its log, and the model."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    options = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=SAMPLES * COUNT, num_generations=SAMPLES, bf16=bf16,
        max_completion_length=LENGTH, max_steps=1, logging_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", seed=3, disable_tqdm=True, beta=0.0, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 8, "max_batch_tokens": 64},
        # Draws of one token are the same with any random numbers.
        top_k=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), lengths, options,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}), processing_class=tokenizer,
    )  # fmt: skip
    if patched:
        hf_fastattn.patch(trainer.model)
    generate, found = trainer._generate_single_turn, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        found.extend(out[0])
        if patched:
            call = hf_fastattn.report(trainer.model).last_call
            assert call.requests_batched == SAMPLES * COUNT and not call.not_looped and not call.fallbacks
            assert hf_fastattn.report(trainer.model).pages_in_use == 0
        return out

    trainer._generate_single_turn = noted
    trainer.train()
    return found, trainer.state.log_history[0], trainer.model


def test_a_step_of_grpo(tmp_path: Path) -> None:
    with own_accelerator():
        tokens, log, model = trained(tmp_path / "ours", True)
        expected, stocks, stock = trained(tmp_path / "stock", False)
    assert tokens == expected and len(tokens) == SAMPLES * COUNT
    for name in ("loss", "reward", "completions/mean_length", "entropy", "grad_norm"):
        assert log[name] == pytest.approx(stocks[name], rel=1e-4, abs=1e-6), name
    hf_fastattn.unpatch(model)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_step_of_grpo_in_16_bits(tmp_path: Path) -> None:
    """TRL's default: accelerate's wrapper around the forward, and weights cast before the batch runs."""
    with own_accelerator():
        tokens, log, _ = trained(tmp_path / "ours", True, bf16=True)
    assert all(len(one) == LENGTH for one in tokens) and log["completions/mean_length"] == LENGTH
