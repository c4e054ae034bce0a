"""LoRA's dropout in train mode without gradients, as GRPO samples: recorded, drawn anew for each row and step.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import drawn_offset
from tests.loop.test_decode_loop import assert_looped
from tests.tools.models import padded_batch, patch_with_graphs, tiny

peft = pytest.importorskip("peft")

SAMPLES, NEW = 400, 3


pytestmark = pytest.mark.usefixtures("device")


def adapted(device: str) -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    return peft.get_peft_model(tiny("llama", num_hidden_layers=2), config).to(device).train()


def samples(model: Any, seed: int, rows: int = SAMPLES, new: int = NEW, **options: Any) -> torch.Tensor:
    ids = padded_batch(1, 7)["input_ids"].expand(rows, -1).to(model.device)
    torch.manual_seed(seed)
    given = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=new, **given)[:, ids.shape[1] :].cpu()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Total variation between two samples of rows."""
    counts = [Counter(map(tuple, rows.tolist())) for rows in (one, other)]
    keys = counts[0].keys() | counts[1].keys()
    return sum(abs(counts[0][key] / len(one) - counts[1][key] / len(other)) for key in keys) / 2


def test_the_distribution_is_stocks(device: str) -> None:
    stock, model = adapted(device), patch_with_graphs(adapted(device))
    theirs, again = samples(stock, 1), samples(stock, 2)
    ours = samples(model, 3)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_captured == 1 and call.graphs_replayed == NEW - 1 and not call.uncaptured
    assert call.fallbacks == {"equal rows are computed one by one: dropout is drawn for every row": 1}
    # By the first, the last, and all tokens; two samples of stock's are as far from each other by chance.
    for part in (slice(0, 1), slice(NEW - 1, NEW)):
        chance = distance(theirs[:, part], again[:, part])
        assert distance(ours[:, part], theirs[:, part]) < 1.5 * chance + 0.05
    model.eval()
    assert distance(samples(model, 3), theirs) > 0.3
    assert assert_looped(model).graphs_captured == 1


def test_every_row_and_step_draws_its_own(device: str) -> None:
    model = patch_with_graphs(adapted(device), keep_in_training=True)
    first, second = samples(model, 1, 64, 8), samples(model, 2, 64, 8)
    assert hf_fastattn.report(model).last_call.graphs_captured == 0
    assert len({tuple(row) for row in first.tolist()}) > 16 and not torch.equal(first, second)
    assert torch.equal(samples(model, 2, 64, 8), second)


def test_draws_of_transformers_are_stocks(device: str) -> None:
    stock, model = adapted(device), patch_with_graphs(adapted(device), sampling="transformers")
    assert torch.equal(samples(model, 5, 8, do_sample=True), samples(stock, 5, 8, do_sample=True))
    call = hf_fastattn.report(model).last_call
    assert call.graphs_replayed == 0 and any("dropout draws" in reason for reason in call.uncaptured)


class Generator:
    def __init__(self) -> None:
        self.offset = 40

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


@pytest.mark.parametrize(("drawn", "end"), [(0, 40), (12, 40 + 3 * drawn_offset.A_STEP), (60, 40 + 3 * drawn_offset.A_STEP)])
def test_steps_ahead_do_not_move_the_generator(drawn: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator()
    monkeypatch.setattr(drawn_offset, "generator_of", lambda device: generator)
    with contextlib.suppress(KeyboardInterrupt), drawn_offset.settled_offset(torch.device("cuda"), lambda: 3):
        generator.offset += drawn
        raise KeyboardInterrupt
    assert generator.offset == end


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_the_generator_ends_where_the_tokens_end(device: str) -> None:
    model, ends = patch_with_graphs(adapted(device)), list(range(3, 128, 9))
    offsets = set()
    for _ in range(4):
        tokens = samples(model, 1, 16, 24, eos_token_id=ends)
        offsets.add((torch.cuda.default_generators[0].get_offset(), tokens.shape[1]))
    assert len(offsets) == 1
