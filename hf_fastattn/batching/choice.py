"""How a manager's requests choose their tokens, and why Transformers' own manager has to serve them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.generation import logits_process as hf

from hf_fastattn.autocast import why_not_forward
from hf_fastattn.graphs.module_checks import has_compiled, why_not_kind
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.known_class import why_not_class
from hf_fastattn.pages.model_layout import is_pageable, template_layers
from hf_fastattn.parallel.gathered_weights import why_counted
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.patches.modules.unchanged import why_not_ours
from hf_fastattn.patches.modules.watched import why_watched

# In Transformers' order.
WARPERS = (hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper)
# As many tokens kept as there are, whatever the vocabulary.
ALL_TOKENS = 1 << 24
# Options of ContinuousBatchingConfig that ask for something of Transformers' own manager, and the values that do not.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "cpu_offload_space": (0.0, 0),
    "scheduler_type": ("fifo",),
    "varlen_compile_config": (None,),
    "decode_compile_config": (None,),
    "default_compile_level": (0,),
}


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Attributes:
        do_sample: draw, or take the likeliest.
        params: of the draw.
        seed: of the draws; None for one from torch's generator.
        own_params: requests may have parameters of their own.
        logprobs: outputs say how likely their tokens were.
    """

    do_sample: bool
    params: SamplingParams
    seed: int | None
    own_params: bool = False
    logprobs: bool = False

    def params_of(self, asked: dict[str, Any]) -> SamplingParams:
        """Of a request that asks for these, as Transformers' processors of a request take them.

        Raises:
            ValueError: a value is out of its range.
        """
        if not self.own_params or not asked:
            return self.params
        top_k, top_p = asked.get("top_k", self.params.top_k), asked.get("top_p", self.params.top_p)
        return replace(
            self.params,
            temperature=asked.get("temperature", self.params.temperature),
            top_k=min(max(top_k, 1), ALL_TOKENS) if "top_k" in asked else top_k,
            top_p=min(max(top_p, 0.0), 1.0),
        )

    def graph_key(self, rows: int, pieces: int = 0) -> GraphKey:
        """Of the step of so many rows, and of so many tokens of prompts beside them."""
        own = self.do_sample and self.own_params
        return GraphKey(rows, self.do_sample, False, False, own_params=own, logprobs=self.logprobs, pieces=pieces)


def choice_of(model: Any, generation_config: Any, batching_config: Any) -> Choice | str:
    """How a manager with these options chooses tokens, or why it has to be Transformers' own."""
    for name, values in OPTIONS.items():
        asked = getattr(batching_config, name, values[0])
        if asked not in values:
            return f"{name}={asked!r} is Transformers' own manager's"
    if getattr(generation_config, "compile_config", None) is not None:
        return "compile_config is set"
    reason = why_not_model(model)
    if reason is not None:
        return reason
    do_sample = bool(getattr(generation_config, "do_sample", True))
    if do_sample and model._fastattn.runtime.config.sampling == "transformers":
        return "sampling='transformers': patch with sampling='fast' for draws on the device"
    params = _params(model._get_logits_processor(generation_config), batching_config.drop_unsupported_processors)
    if isinstance(params, str):
        return params
    # Older releases lack one or the other.
    own_params = bool(getattr(batching_config, "per_request_processors", False))
    return Choice(
        do_sample, params, batching_config.seed, own_params, bool(getattr(batching_config, "return_logprobs", False))
    )


def _params(given: Any, drops: bool) -> SamplingParams | str:
    """Those of the processors that are there; Transformers drops what it knows not to work in a batch of requests."""
    kept = [one for one in given if not (drops and getattr(one, "supports_continuous_batching", None) is False)]
    places = [WARPERS.index(type(one)) if type(one) in WARPERS else -1 for one in kept]
    if -1 in places or places != sorted(set(places)):
        return f"logits processors {', '.join(type(one).__name__ for one in kept)}"
    for one in kept:
        if getattr(one, "filter_value", -torch.inf) != -torch.inf or getattr(one, "min_tokens_to_keep", 1) != 1:
            return f"a {type(one).__name__} with its own filter_value or min_tokens_to_keep"
    found = {type(one): one for one in kept}
    temperature, top_k, top_p, min_p = (found.get(kind) for kind in WARPERS)
    return SamplingParams(
        temperature=1.0 if temperature is None else float(temperature.temperature),
        top_k=0 if top_k is None else int(top_k.top_k),
        top_p=1.0 if top_p is None else float(top_p.top_p),
        min_p=0.0 if min_p is None else float(min_p.min_p),
    )


def why_not_model(model: Any) -> str | None:
    """Why a batch of requests cannot be computed by the decoder and `lm_head` of a patched model alone."""
    state = model._fastattn
    decoder = state.decoder(model)
    unknown = why_not_class(model) or why_not_forward(model)
    if unknown is not None:
        return unknown
    if not all(map(is_pageable, template_layers(model.config))):
        return "a linear attention keeps a state"
    if state.runtime.variants:
        return "attention has a variant"
    if getattr(model, "_device_mesh", None) is not None:
        return "the model is sharded over several processes"
    counted = why_counted(model)
    if counted is not None:
        return counted
    if model.device.type == "meta":
        return "the weights are offloaded"
    if has_compiled(model):
        return "torch.compile made parts of the model"
    if drops_cache(decoder):
        return "gradient checkpointing drops the cache"
    return why_not_kind(model) or why_not_ours(decoder) or why_watched(decoder)
