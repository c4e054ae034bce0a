"""Tiny models that would notice a fault, and the checks that every model test makes.

Untied embeddings, `initializer_range=0.3` and random biases and norms make attention matter: at the usual 0.02 with
tied embeddings even swapped pages leave the greedy tokens as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_fastattn

# Before 5.23, stock loses keys or fails when it crops a cache whose window is already full, feeds the whole chat again
# when a later turn is prefilled in chunks, and fails where `OLD` tests skip.
OLD = Version(transformers.__version__) < Version("5.23")
VOCAB = 128
WINDOW = 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED_WINDOW: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
}
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
# A short original length: the queries of every 16 positions are scaled differently.
QUERY_SCALE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 16.0,
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 16,
}
EVERY_LAYER_WINDOW: dict[str, Any] = {"sliding_window": WINDOW}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# Rotary dims are half of the head's 16: enough positions matter.
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
DEEPSTACK: dict[str, Any] = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS}
NO_ROPE: dict[str, Any] = {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}
MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.3,
    "pad_token_id": 0,
}


def axes(sections: list[int]) -> dict[str, Any]:
    """RoPE on three axes, with so many frequencies of each."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


# (name of the classes without Config and ForCausalLM, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", MIXED_WINDOW),
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED_LAYERS}),
    "ministral3": ("Ministral3", {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": QUERY_SCALE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", EVERY_LAYER_WINDOW),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, **MIXED_WINDOW, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_window": ("Qwen3", {"head_dim": 32, **MIXED_WINDOW}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **EXPERTS}),
    "qwen3_next": ("Qwen3Next", {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "apertus": ("Apertus", {"pad_token_id": 0}),
    "arcee": ("Arcee", {"head_dim": 16}),
    "cwm": ("Cwm", {**MIXED, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1}),
    "exaone": ("Exaone", {}),
    "exaone4": ("Exaone4", {**MIXED, "head_dim": 16, "pad_token_id": 0}),
    "granite": ("Granite", MULTIPLIERS),
    "hyperclovax": ("HyperCLOVAX", {**MULTIPLIERS, "use_post_norm": True}),
    "jais2": ("Jais2", {"head_dim": 16}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "olmo3": ("Olmo3", {**MIXED, "pad_token_id": 0}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "pad_token_id": 0}),
    "smollm3": ("SmolLM3", NO_ROPE),
    "smollm3_window": ("SmolLM3", {**NO_ROPE, **MIXED, "use_sliding_window": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
}
# Configurations whose models are another family's.
BORROWED = {"Exaone": "Llama"}
HYBRID_AXES = {"rope_parameters": {**axes([2, 1, 1]), "partial_rotary_factor": 0.5}}
IMAGE_TOKEN = VOCAB - 1
VISION_START = VOCAB - 3
PATCH_VALUES = 3 * 2 * 4 * 4
VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "initializer_range": 0.3,
}
AUDIO: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 64,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}
# (name of the classes, what differs from COMMON in the text decoder, and from VISION in the tower)
VISION_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VL", {"rope_parameters": axes([2, 3, 3])}, {"embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": axes([2, 3, 3]), **MIXED_WINDOW},
        {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": ("Qwen3VL", {"head_dim": 16, "rope_parameters": axes([4, 2, 2])}, DEEPSTACK),
    "qwen3_vl_moe": ("Qwen3VLMoe", {"head_dim": 16, "rope_parameters": axes([4, 2, 2]), **EXPERTS}, DEEPSTACK),
    "qwen3_5": ("Qwen3_5", {**HYBRID, **HYBRID_AXES}, {"num_position_embeddings": 64}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**HYBRID, **HYBRID_AXES, **EXPERTS, "shared_expert_intermediate_size": 32},
        {"num_position_embeddings": 64},
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniThinker",
        {"rope_parameters": axes([2, 3, 3]), **MIXED_WINDOW},
        {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinker", {"head_dim": 16, "rope_parameters": axes([4, 2, 2]), **EXPERTS}, DEEPSTACK),
}
# The release that brought a family, where that is not the oldest one that is supported.
SINCE = {"exaone": "5.24"}
FAMILIES = tuple(
    family for family in (*MODELS, *VISION_MODELS) if Version(transformers.__version__) >= Version(SINCE.get(family, "0"))
)
# The families that every feature is tested with.
CORE = ("llama", "qwen2", "qwen2_window")


def build(family: str, over: Mapping[str, Any]) -> Any:
    """A new model of `family`; `over`: entries of the text decoder's configuration."""
    if family in MODELS:
        name, special = MODELS[family]
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **special, **over})
        return getattr(transformers, f"{BORROWED.get(name, name)}ForCausalLM")(config)
    name, special, vision = VISION_MODELS[family]
    audio = {"audio_config": AUDIO, "audio_token_id": VOCAB - 5} if "Thinker" in name else {}
    config = getattr(transformers, f"{name}Config")(
        text_config={**COMMON, **special, **over},
        vision_config={**VISION, **vision},
        **audio,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VOCAB - 4,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def settled(make: Callable[[], Any], seed: int = 0) -> Any:
    """The model that `make` builds, in eval mode; the same `seed` gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny(family: str, seed: int = 0, **over: Any) -> Any:
    """A model of `family` in eval mode; the same `seed` gives the same weights. `over`: config entries."""
    return settled(lambda: build(family, over), seed)


def pair(family: str, options: Mapping[str, Any] | None = None, **over: Any) -> tuple[Any, Any]:
    """(stock model, patched model) of the same weights."""
    return tiny(family, **over), hf_fastattn.patch(tiny(family, **over), **(options or {}))


def pair_with_graphs(family: str, options: Mapping[str, Any] | None = None, **over: Any) -> tuple[Any, Any]:
    """`pair`, with decode steps replayed."""
    return pair(family, {"cuda_graphs": True, **(options or {})}, **over)


def patch_with_graphs(model: Any, **options: Any) -> Any:
    """`hf_fastattn.patch` with decode steps replayed."""
    return hf_fastattn.patch(model, **{"cuda_graphs": True, **options})


def noisy(model: PreTrainedModel, amount: float = 0.01) -> PreTrainedModel:
    """`model` with its weights moved a little: an assistant that is right only sometimes."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


def padded_batch(rows: int = 3, longest: int = 37, seed: int = 1) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[rows, longest]`, left-padded; no two rows of equal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * (longest - 9) // max(rows - 1, 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def image_batch(family: str = "qwen2_vl", seed: int = 1) -> dict[str, torch.Tensor]:
    """A prompt batch `[3, 37]` with padding and images: none in the last row, two of different sizes in the first."""
    batch = padded_batch(3, 37, seed)
    grids = [(1, 4, 4), (1, 4, 8), (1, 8, 4)]
    places = [(0, 3), (0, 20), (1, 25)]
    ids = batch["input_ids"].clamp(max=VOCAB - 8)
    for (row, column), (_, height, width) in zip(places, grids, strict=True):
        ids[row, column - 1] = VISION_START
        ids[row, column : column + height * width // 4] = IMAGE_TOKEN
    patches = sum(height * width for _, height, width in grids)
    pixels = torch.randn(patches, PATCH_VALUES, generator=torch.Generator().manual_seed(seed))
    # The thinkers of the Omni models find the images in the tokens.
    types = {} if "omni" in family else {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    return {
        **batch,
        **types,
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor(grids),
    }


def repeated_images(batch: Mapping[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    """The rows of an `image_batch` in another order or more often, with their images."""
    grids, owned = batch["image_grid_thw"], [[0, 1], [2], []]
    patches = batch["pixel_values"].split(grids.prod(1).tolist())
    units = [unit for row in order for unit in owned[row]]
    rows = {name: value[order] for name, value in batch.items() if len(value) == 3 and name != "image_grid_thw"}
    return {**rows, "image_grid_thw": grids[units], "pixel_values": torch.cat([patches[unit] for unit in units])}


def single(length: int = 37, seed: int = 1) -> dict[str, torch.Tensor]:
    """One row without padding."""
    return padded_batch(1, length, seed)


def real_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of `batch` that are no padding."""
    return int(batch["attention_mask"].sum())


def assert_fast(
    model: Any,
    prompt_tokens: int | None = None,
    shared: bool | None = None,
    fallbacks: tuple[str, ...] = (),
    held: int | None = 0,
) -> Any:
    """Our path did the work of the last call.

    Args:
        prompt_tokens: prompt tokens that it must have computed.
        shared: whether pages must have been shared.
        fallbacks: a word of each expected fallback reason; no other reason may have come up.
        held: pages that may still be held; `None` for any number.
    """
    call = hf_fastattn.report(model).last_call
    assert call is not None and call.forwards > 0
    if not fallbacks:
        assert call.fallbacks == {}
    else:
        assert call.fallbacks
        assert all(any(word in reason for word in fallbacks) for reason in call.fallbacks), call
    if prompt_tokens is not None:
        assert call.prompt_tokens == prompt_tokens
    if shared is not None:
        assert (call.pages_shared > 0) == shared
    if held is not None:
        assert hf_fastattn.report(model).pages_in_use == held
    return call


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models: token i is one letter."""
    vocab = {chr(i if 33 <= i <= 126 else 256 + i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
