"""Models with a vision tower in the device's loop: images in the prompt, then text, whose positions are one on all axes.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.transformers_version import CACHE
from tests.loop.test_decode_loop import ENDS, assert_looped, run
from tests.tools.fused_layers import LAYER_COUNT, SMALL, count_launches, expected
from tests.tools.models import IMAGE_TOKEN, assert_fast, image_batch, pair_with_graphs, real_tokens, tiny

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
NEW = 16


def both(family: str, device: str) -> tuple[Any, Any]:
    stock, model = pair_with_graphs(family)
    return stock.to(device), model.to(device)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock(family: str, device: str) -> None:
    stock, model = both(family, device)
    batch = image_batch(family)
    seen = []
    for options in ({}, {"eos_token_id": ENDS}, {"repetition_penalty": 1.4}, {"num_return_sequences": 2, "do_sample": True}):
        options = {**options, **({"top_k": 1} if "do_sample" in options else {})}
        want = run(stock, NEW, **batch, **options)
        assert torch.equal(run(model, NEW, **batch, **options), want), options
        assert assert_looped(model).prompt_tokens == real_tokens(batch)
        seen.append(want)
    # The images matter, and where they stand.
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    want = run(stock, NEW, **other)
    for _ in range(2):
        assert torch.equal(run(model, NEW, **other), want) and not torch.equal(want, seen[0])
    assert assert_looped(model).graphs_captured == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone(family: str, device: str) -> None:
    stock, model = both(family, device)
    for options in ({}, {"eos_token_id": ENDS}):
        assert torch.equal(run(model, NEW, **options), run(stock, NEW, **options))
        assert_looped(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_chat(family: str, device: str) -> None:
    """The second turn begins where the images of the first one have left the positions."""
    outs = []
    for side in both(family, device):
        batch = image_batch(family)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        first = run(side, NEW, **batch, return_dict_in_generate=True)
        ids = torch.cat((first.sequences.cpu(), torch.full((3, 3), 9)), 1)
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: first[CACHE]}
        outs.append(run(side, NEW, **later))
    assert torch.equal(*outs)
    model: Any = side
    assert hf_fastattn.report(model).last_call.fast_loops == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_ends_within_an_image(family: str, device: str) -> None:
    """The axes of its last token disagree, and so do those of the text that follows."""
    stock, model = both(family, device)
    batch = image_batch(family)
    ids = batch["input_ids"][1:2].clone()
    ids[0, -1], ids[0, 25:37] = IMAGE_TOKEN, 5
    ids[0, -9], ids[0, -8:] = 125, IMAGE_TOKEN
    grid = batch["image_grid_thw"][1:2]
    pixels = batch["pixel_values"][16:48]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
             "pixel_values": pixels, "image_grid_thw": grid}  # fmt: skip
    assert torch.equal(run(model, NEW, **given), run(stock, NEW, **given))
    call = assert_fast(model)
    assert call.fast_loops == 0 and any("ends within an image" in reason for reason in call.not_looped)


@pytest.mark.parametrize("where", ["model", "model.visual", "model.language_model", "model.language_model.layers.1"])
def test_hooks_are_called(where: str, device: str) -> None:
    stock, model = both("qwen2_vl", device)
    calls: list[Any] = []
    for side in (stock, model):
        side.get_submodule(where).register_forward_hook(lambda *given, side=side: calls.append(side))
    batch = image_batch()
    assert torch.equal(run(model, NEW, **batch), run(stock, NEW, **batch))
    counts = [sum(side is each for each in calls) for side in (stock, model)]
    assert counts[0] == counts[1] > 0
    assert hf_fastattn.report(model).last_call.fast_loops == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_fused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: Counter[str] = count_launches(monkeypatch)
    stock, model = tiny(family, **SMALL), hf_fastattn.patch(tiny(family, **SMALL))
    assert fused_reason(model.model.language_model) is None
    batch = image_batch(family)
    options = {**batch, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**options), stock.generate(**options))
    assert_fast(model)
    if family == "qwen3_vl_moe":
        # What its layers launch is counted in the tests of experts.
        assert launched["matvec"] > 0
        return
    # Of the prompt only where no features of images are added to the states between the layers.
    prompt = Counter() if family == "qwen3_vl" else Counter(expected(real_tokens(batch)))
    assert launched == prompt + Counter({name: 2 * count for name, count in expected(3).items()})
    assert LAYER_COUNT == len(model.model.language_model.layers)
