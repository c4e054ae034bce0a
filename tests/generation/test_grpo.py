"""GRPO with TRL (Shao et al., 2024), without vLLM: the calls of the largest group of users, as they really come.

TRL repeats each prompt by hand, pads on the left, generates in train mode, and computes log-probabilities and gradients
with the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED
from tests.tools.accelerator import own_accelerator

pytest.importorskip("trl")

STEPS, SAMPLES, PROMPTS, NEW = 3, 4, 2, 8
TEXTS = ["The cat", "One day a little girl went", "It was late", "Tim and his dog saw a big", "Her name was", "They had a"]


def length_and_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [len(text) / 10 + text.count("e") for text in completions]


def train(folder: Path, patched: bool, lora: bool) -> tuple[list[dict[str, float]], Any, list[tuple[int, int]]]:
    """The log of a few steps, the model, and of each generate() call (prompt tokens computed, fallbacks)."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=SAMPLES * PROMPTS, num_generations=SAMPLES,
        max_completion_length=NEW, max_steps=STEPS, logging_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=True, save_strategy="no", seed=3, disable_tqdm=True, beta=0.0,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0) if lora else None
    trainer = GRPOTrainer(
        model, length_and_letters, options, train_dataset=Dataset.from_dict({"prompt": TEXTS * 4}),
        processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip
    calls: list[tuple[int, int]] = []
    if patched:
        hf_fastattn.patch(trainer.model, sampling="transformers")
        _note_calls(trainer, calls)
    trainer.train()
    return trainer.state.log_history, trainer.model, calls


def _note_calls(trainer: Any, calls: list[tuple[int, int]]) -> None:
    generate = trainer._generate_single_turn

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        last = hf_fastattn.report(trainer.model).last_call
        calls.append((last.prompt_tokens, sum(last.fallbacks.values())))
        return out

    trainer._generate_single_turn = noted


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_losses_and_rewards_are_stocks(lora: bool, tmp_path: Path) -> None:
    with own_accelerator():
        want, stock, _ = train(tmp_path / "stock", False, lora)
        got, model, calls = train(tmp_path / "ours", True, lora)
    assert len(want) == len(got) == STEPS + 1
    for theirs, ours in zip(want[:-1], got[:-1], strict=True):
        for name in ("loss", "reward", "reward_std", "completions/mean_length", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert len(calls) == STEPS
    for prompt_tokens, fallbacks in calls:
        # Two distinct prompts a step, each once, though there are four rows of each.
        assert 2 * lengths[0] <= prompt_tokens <= 2 * lengths[-1] and fallbacks == 0
    hf_fastattn.unpatch(model)
    for theirs, ours in zip(stock.parameters(), model.parameters(), strict=True):
        assert torch.allclose(theirs, ours, rtol=1e-3, atol=1e-5)
