"""Transformers' own continuous batching, of tiny models on stock's attention and on ours."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_fastattn.interface import counters
from tests.interface import tiny as without_family
from tests.tools import models as families
from tests.tools.models import VOCAB

NEW = 20
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


def pair(name: str, device: str = "cpu", **over: Any) -> tuple[Any, Any]:
    """(model on stock's attention, one on ours) of the same weights."""
    if name in without_family.MODELS:
        stock, model = without_family.build_pair(name, **over)
        return stock.to(device), model.to(device)
    stock = families.tiny(name)
    stock.set_attn_implementation("sdpa")
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fastattn")
    return stock.to(device), model.to(device)


def prompts(count: int, longest: int = 70, seed: int = 0) -> list[list[int]]:
    """Random prompts of random lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def batching(page: int = 32, tokens: int = 2048, most: int = 128, **options: Any) -> ContinuousBatchingConfig:
    """Options of a small cache.

    Args:
        page: tokens a page.
        tokens: that the cache holds.
        most: tokens of a forward.
    """
    return ContinuousBatchingConfig(**{PAGE: page}, num_blocks=-(-tokens // page), max_batch_tokens=most, **options)


def greedy(new: int = NEW, copies: int = 1) -> GenerationConfig:
    """Greedy search without an end.

    Args:
        copies: of each request, which `generate()` refuses to make without sampling.
    """
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    config.num_return_sequences = copies
    return config


def batched(model: Any, given: list[list[int]], new: int = NEW, config: Any = None, copies: int = 1) -> list[list[int]]:
    """New tokens of each prompt by `generate_batch`."""
    outputs = model.generate_batch(
        given, generation_config=greedy(new, copies), continuous_batching_config=config or batching()
    )
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


def alone(model: Any, given: list[list[int]], new: int = NEW) -> list[list[int]]:
    """New tokens of each prompt by `generate()`."""
    found = []
    for prompt in given:
        ids = torch.tensor([prompt], device=model.device)
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found.append(model.generate(ids, **options)[0, len(prompt) :].tolist())
    return found


def assert_in_place(backend: str = "reference", layers: int = 3) -> None:
    """Our kernels computed all layers of all forwards, and every decode step read pages in place."""
    assert not counters.fallbacks and set(counters.kernels) == {backend}, counters
    assert counters.batches["decode: pages in place"] > 0, counters
    assert [name for name in counters.batches if name.startswith("decode")] == ["decode: pages in place"], counters
    assert counters.kernels[backend] == layers * counters.batches.total(), counters
