"""Tiny models that put a tower for images or sound before a text decoder of ours, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.tools.models import COMMON, VOCAB, settled

MEDIA_TOKEN = VOCAB - 1
TEXT: dict[str, Any] = {**COMMON, "pad_token_id": 0}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
SOUND: dict[str, Any] = {
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "initializer_range": 0.3,
}
LLAVA: dict[str, Any] = {"image_token_index": MEDIA_TOKEN, "vision_feature_layer": -1, "image_token_id": MEDIA_TOKEN}
IDEFICS: dict[str, Any] = {"image_token_id": MEDIA_TOKEN, "scale_factor": 2}


@dataclass(frozen=True)
class Composite:
    """A model with a tower.

    Attributes:
        name: of its classes.
        text: model type of the decoder.
        tower: the entry of the configuration that describes the tower, and its values.
        entries: others of the configuration.
        tokens: that one image or sound takes.
        shape: of what the tower is given for one of them; the first input's name is that of the tower's main input.
        by_row: the model takes `[rows, images, ...]`.
        more: inputs beside the main one, for one image or sound.
    """

    name: str
    text: str
    tower: tuple[str, dict[str, Any]]
    entries: dict[str, Any]
    tokens: int
    shape: tuple[int, ...]
    main: str = "pixel_values"
    by_row: bool = False
    more: dict[str, torch.Tensor] = field(default_factory=dict)


IMAGE = (3, 16, 16)
SIZE = torch.tensor([16, 16])
COMPOSITES: dict[str, Composite] = {
    "llava": Composite("Llava", "llama", ("vision_config", CLIP), LLAVA, 16, IMAGE),
    "llava_next": Composite(
        "LlavaNext", "llama", ("vision_config", CLIP), {**LLAVA, "image_grid_pinpoints": [[16, 16]]},
        36, (2, *IMAGE), more={"image_sizes": SIZE},
    ),
    "llava_onevision": Composite(
        "LlavaOnevision", "qwen2", ("vision_config", SIGLIP), {**LLAVA, "image_grid_pinpoints": [[16, 16]]},
        36, (2, *IMAGE), more={"image_sizes": SIZE},
    ),
    "vipllava": Composite(
        "VipLlava", "llama", ("vision_config", CLIP), {**LLAVA, "vision_feature_layers": [-1, 0]}, 16, IMAGE
    ),
    "mistral3": Composite(
        "Mistral3", "mistral", ("vision_config", {**TOWER, "model_type": "pixtral", "head_dim": 16}),
        {**LLAVA, "spatial_merge_size": 2}, 4, IMAGE, more={"image_sizes": SIZE},
    ),
    "internvl": Composite(
        "InternVL", "qwen2", ("vision_config", {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}),
        {**LLAVA, "downsample_ratio": 0.5}, 4, IMAGE,
    ),
    "idefics3": Composite(
        "Idefics3", "llama", ("vision_config", TOWER), IDEFICS, 4, IMAGE, by_row=True
    ),
    "smolvlm": Composite(
        "SmolVLM", "llama", ("vision_config", TOWER), IDEFICS, 4, IMAGE, by_row=True
    ),
    "voxtral": Composite(
        "Voxtral", "llama",
        ("audio_config", {**SOUND, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1,
                          "num_attention_heads": 2}),
        {"audio_token_id": MEDIA_TOKEN}, 8, (16, 64), main="input_features",
    ),
    "qwen2_audio": Composite(
        "Qwen2Audio", "qwen2",
        ("audio_config", {**SOUND, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}),
        {"audio_token_index": MEDIA_TOKEN, "audio_token_id": MEDIA_TOKEN}, 16, (16, 64), main="input_features",
        more={"feature_attention_mask": torch.ones(64, dtype=torch.long)},
    ),
}  # fmt: skip


def composite(name: str) -> Any:
    """The model `name`, in eval mode; every call gives the same weights."""

    def build() -> Any:
        known = COMPOSITES[name]
        config = getattr(transformers, f"{known.name}Config")(
            text_config={**TEXT, "model_type": known.text},
            **{known.tower[0]: dict(known.tower[1])},
            **known.entries,
            tie_word_embeddings=False,
        )
        return getattr(transformers, f"{known.name}ForConditionalGeneration")(config)

    return settled(build)


def media_batch(name: str, order: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    """A prompt batch with padding: `order` says which of three images or sounds each row has, all of them with one text.

    Rows of the same image are equal; the last of three prompts is the longest.
    """
    known = COMPOSITES[name]
    columns = known.tokens + 20
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB - 8, (columns,), generator=generator)
    media = torch.randn(3, *known.shape, generator=generator)
    rows, masks = [], []
    for which in order:
        row, mask = ids.clone(), torch.ones_like(ids)
        row[12 : 12 + known.tokens] = MEDIA_TOKEN
        padding = 5 * (which % 2)
        row[:padding] = mask[:padding] = 0
        rows.append(row)
        masks.append(mask)
    chosen = media[list(order)]
    more = {key: value.expand(len(order), *value.shape).clone() for key, value in known.more.items()}
    return {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks),
        known.main: chosen[:, None] if known.by_row else chosen,
        **more,
    }
