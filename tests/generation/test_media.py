"""Models with a vision tower: prompts with images, computed once for all samples and beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.generation import media
from hf_fastattn.patches.decoder import forward as decoder
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import OLD, VISION_MODELS, assert_fast, image_batch, padded_batch, pair, real_tokens, repeated_images

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 4},
}


def generate(model: Any, batch: dict[str, torch.Tensor], call: str = "greedy", **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=12, **{**CALLS[call], **options})


def work(family: str, call: str, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a call has to compute. In old versions stock mixes up the thinkers' images by repeating them patch by patch, and
    so do we then."""
    if OLD and "omni" in family and call != "greedy":
        return {}
    return {"prompt_tokens": real_tokens(batch), "shared": call != "greedy"}


@pytest.mark.parametrize("family", VISION_MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_images(family: str, call: str) -> None:
    stock, model = pair(family)
    batch = image_batch(family)
    expected = generate(stock, batch, call)
    assert torch.equal(generate(model, batch, call), expected)
    assert_fast(model, **work(family, call, batch))
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.equal(generate(model, other, call), expected)


@pytest.mark.parametrize("family", VISION_MODELS)
def test_images_without_padding(family: str) -> None:
    stock, model = pair(family)
    batch = image_batch(family)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    for call in CALLS:
        assert torch.equal(generate(model, batch, call), generate(stock, batch, call))
        assert_fast(model, **work(family, call, batch))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_tower_sees_an_image_once(family: str) -> None:
    _, model = pair(family)
    patches = []
    model.model.visual.patch_embed.register_forward_hook(lambda _, inputs, __: patches.append(len(inputs[0])))
    generate(model, image_batch(family), "samples")
    assert sum(patches) == len(image_batch(family)["pixel_values"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_identical_text_rows_are_computed_once(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    repeated = {name: value[[0, 1, 0, 2, 1]] for name, value in batch.items()}
    assert torch.equal(generate(model, repeated, "samples"), generate(stock, repeated, "samples"))
    assert_fast(model, real_tokens(batch), shared=True)


@pytest.mark.parametrize("family", VISION_MODELS)
def test_repeated_rows_with_images_are_computed_once(family: str) -> None:
    """As a trainer repeats prompts: equal neighbours, images and all, without `num_return_sequences`."""
    stock, model = pair(family)
    batch = image_batch(family)
    repeated = repeated_images(batch, [0, 0, 1, 1, 2, 0])
    draws = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    assert torch.equal(generate(model, repeated, "greedy", **draws), generate(stock, repeated, "greedy", **draws))
    assert_fast(model, real_tokens(batch), shared=True)


@pytest.mark.parametrize("patch", [0, -1])
def test_one_patch_keeps_rows_apart(patch: int) -> None:
    stock, model = pair("qwen2_5_vl")
    batch = image_batch()
    repeated = repeated_images(batch, [1, 1, 1])
    assert torch.equal(repeated["input_ids"][0], repeated["input_ids"][1])
    repeated["pixel_values"][patch] += 1
    assert torch.equal(generate(model, repeated), generate(stock, repeated))
    assert_fast(model, 2 * int(batch["attention_mask"][1].sum()), shared=True)


def test_contents_of_equal_sums_are_different() -> None:
    """Sums of bits only find candidates."""
    images = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    assert media._kinds(images, [1, 1, 1]) == [0, 1, 0]
    assert media._kinds(images.repeat(2, 1)[[0, 1, 2, 0, 1, 2]], [2, 1, 2, 1]) == [0, 1, 0, 1]
    assert media._kinds(images[[0, 1, 1, 0]], [1, 1, 1, 1]) == [0, 1, 1, 0]


def test_images_that_do_not_fit_the_rows_keep_them_apart() -> None:
    with pytest.raises(media.Unknown, match="do not fit"):
        media.owners("image", [4, 4], [3, 5])
    assert media.owners("image", [8, 0, 4], [3, 5, 4]) == [range(2), range(2, 2), range(2, 3)]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_positions_on_three_axes_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(family)
    batch = image_batch(family)
    assert torch.equal(generate(model, batch), generate(stock, batch))
    prepare = decoder._packed_arguments

    def faulty(*args: Any) -> dict[str, Any]:
        arguments = prepare(*args)
        positions = arguments["position_ids"]
        return {**arguments, "position_ids": positions[:1].expand_as(positions)}

    monkeypatch.setattr(decoder, "_packed_arguments", faulty)
    assert not torch.equal(generate(model, batch), generate(stock, batch))


def test_deepstack_features_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("qwen3_vl")
    batch = image_batch()
    pack = decoder._packed_visual

    def faulty(*args: Any) -> dict[str, Any]:
        arguments = pack(*args)
        embeds = [features.roll(1, 0) for features in arguments["deepstack_visual_embeds"]]
        return {**arguments, "deepstack_visual_embeds": embeds}

    monkeypatch.setattr(decoder, "_packed_visual", faulty)
    assert not torch.equal(generate(model, batch), generate(stock, batch))


@pytest.mark.parametrize("family", VISION_MODELS)
def test_forwards_over_a_paged_cache(family: str) -> None:
    """Without generate(): the model works out the positions itself, which it can do for unpadded rows."""
    stock, model = pair(family)
    batch = image_batch()
    del batch["attention_mask"]
    results = []
    for side, cache in ((stock, None), (model, hf_fastattn.PagedCache(model.config))):
        with torch.no_grad():
            first = side(**batch, **{CACHE: cache}, use_cache=True)
            second = side(torch.full((3, 2), 7), **{CACHE: first[CACHE]})
        results.append((first.logits, second.logits))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert_fast(model, batch["input_ids"].numel(), held=None)
