"""The ways `generate()` is called: each a function of a model, a size, the seed of the prompts, and options of all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hf_fastattn
from hf_fastattn.eval.generate_speed.cases import LOOKUP, TOP_K, TOP_P, Case, Cooler, Reader
from hf_fastattn.eval.matrix_cells.families import Size
from hf_fastattn.transformers_version import CACHE

SAMPLED = {"do_sample": True, "top_k": TOP_K, "top_p": TOP_P}
# Tokens of a chat's second message.
MESSAGE = 16
# Calls whose tokens are those of the greatest scores.
GREEDY = (
    "greedy", "batch", "penalty", "beams", "padded", "chat", "embeds", "streamer", "processor", "lookup", "no cache",
)  # fmt: skip

Call = Callable[[Any, Size, int, dict[str, Any]], Any]


def ids_of(model: Any, size: Size, rows: int, seed: int, kind: str = "greedy") -> Tensor:
    """Prompts `[rows, prompt]` of random tokens."""
    return Case(kind, rows, size.prompt).ids(model.config.vocab_size, seed, model.device)


def _plain(rows: int | str, **options: Any) -> Call:
    """A call of `rows` prompts, or of as many as a batch has."""

    def call(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
        ids = ids_of(model, size, size.rows if rows == "batch" else int(rows), seed)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **common)

    return call


def _samples(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    return _plain(1, num_return_sequences=size.rows, **SAMPLED)(model, size, seed, common)


def _repeated(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    ids = ids_of(model, size, 2, seed).repeat_interleave(size.rows, 0)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **SAMPLED, **common)


def _padded(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    ids = ids_of(model, size, size.rows, seed)
    starts = torch.arange(size.rows, device=ids.device)[:, None] * (size.prompt // (2 * size.rows))
    mask = (torch.arange(size.prompt, device=ids.device) >= starts).long()
    return model.generate(input_ids=ids * mask, attention_mask=mask, **common)


def _chat(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    """Two turns over one cache."""
    ids = ids_of(model, size, 1, seed)
    is_ours = hf_fastattn.report(model).patched
    cache = hf_fastattn.PagedCache(model.config) if is_ours else DynamicCache(config=model.config)
    first = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **common)
    tokens = first if isinstance(first, Tensor) else first.sequences
    both = torch.cat((tokens, ids[:, :MESSAGE]), 1)
    return model.generate(input_ids=both, attention_mask=torch.ones_like(both), **{CACHE: cache}, **common)


def _embeds(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    ids = ids_of(model, size, 1, seed)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    return model.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(ids), **common)


def _streamer(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    return _plain(1, streamer=Reader())(model, size, seed, common)


def _processor(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    return _plain(1, logits_processor=[Cooler()])(model, size, seed, common)


def _lookup(model: Any, size: Size, seed: int, common: dict[str, Any]) -> Any:
    ids = ids_of(model, size, 1, seed, "drafts")
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=LOOKUP, **common)


CALLS: dict[str, Call] = {
    "greedy": _plain(1),
    "batch": _plain("batch"),
    "penalty": _plain("batch", repetition_penalty=1.2, no_repeat_ngram_size=3),
    "sampled": _plain("batch", **SAMPLED),
    "min-p": _plain("batch", do_sample=True, temperature=0.8, min_p=0.05),
    "typical": _plain("batch", do_sample=True, typical_p=0.9),
    "samples": _samples,
    "repeated": _repeated,
    "beams": _plain(1, num_beams=4),
    "padded": _padded,
    "chat": _chat,
    "embeds": _embeds,
    "streamer": _streamer,
    "processor": _processor,
    "lookup": _lookup,
    "no cache": _plain(1, use_cache=False),
}
