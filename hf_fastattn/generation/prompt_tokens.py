"""Which tokens the rows of a prompt consist of, and why their pages may not serve other rows or calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.module_checks import names_by_row, submodules, why_not_kind
from hf_fastattn.graphs.seen_modules import Seen, look
from hf_fastattn.parallel.gathered_weights import why_counted
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.patches.modules.watched import why_rows_differ
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.wrappers import prepared_by

# Inputs that a prompt of nothing but tokens comes with.
_PLAIN_INPUTS = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict")
# What a call may ask of the prompt's forward that pages of earlier rows do not have.
_ASKED_OF_PROMPT = ("output_hidden_states", "output_attentions", "output_router_logits")
STATES = "states of the prompt's tokens are asked for"
HIDDEN, NOT_FROM_0 = "the mask hides the last column", "a row's positions do not count its tokens from 0"


def why_not_tokens(input_ids: Any, model_kwargs: dict[str, Any], cache: PagedCache, config: Any) -> str | None:
    """Why the rows of a prompt are more than sequences of tokens, or pages cannot be told by these alone."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        return "the prompt is not given as tokens"
    others = [
        name
        for name, value in model_kwargs.items()
        if value is not None and value is not False and value != {} and name not in _PLAIN_INPUTS
    ]
    if any(name in _ASKED_OF_PROMPT for name in others):
        return STATES
    if others:
        return f"{', '.join(sorted(others))} may change what a token means"
    if set(cache.tables) != {None}:
        return "pages behind a sliding window are released"
    if any(layer not in cache.paged_layers for layer in cache.layers):
        return "linear-attention layers keep a state"
    if config.get_text_config(decoder=True) is not config:
        return "the model has towers, whose input gives tokens other positions"
    return None


def tokens_of_rows(input_ids: Tensor, mask: Any, positions: Any) -> tuple[list[NDArray[np.int64]], Tensor] | str:
    """For each row its tokens without padding, and `[B, S]` bool on the host, where they are; or why there are none such."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != input_ids.shape):
        return "the mask is none of the prompt's columns"
    if positions is not None and (
        not isinstance(positions, Tensor) or positions.shape[-1] != input_ids.shape[1] or positions.ndim != 2
    ):
        return "positions are given on several axes"
    if input_ids.device.type == "cpu":
        return _tokens_on_host(input_ids, mask, positions)
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else (mask != 0).to(input_ids.device)
    counted = real.cumsum(1)
    flags = [real[:, -1].all(), _all(real[:, 1:] >= real[:, :-1])]
    if positions is not None:
        given = positions.to(input_ids.device).expand_as(input_ids)
        flags.append(_all((given == counted - 1) | ~real))
    # In one copy, for which a device is waited for.
    copied = torch.cat((torch.stack(flags), counted[:, -1], input_ids.detach().flatten())).to("cpu", torch.int64)
    ends, on_the_left, *counts_from_0 = copied[: len(flags)].tolist()
    rows, columns = input_ids.shape
    counts, ids = copied[len(flags) : len(flags) + rows], copied[len(flags) + rows :].view(rows, columns)
    if not ends:
        return HIDDEN
    if counts_from_0 == [0]:
        return NOT_FROM_0
    if on_the_left:
        tokens = counts.tolist()
        found = [row[columns - count :] for row, count in zip(ids.numpy(), tokens, strict=True)]
        return found, host_masks.after_padding(tokens, columns)
    shown = real.to("cpu")
    return [row[kept] for row, kept in zip(ids.numpy(), shown.numpy(), strict=True)], shown


def _tokens_on_host(input_ids: Tensor, mask: Any, positions: Any) -> tuple[list[NDArray[np.int64]], Tensor] | str:
    """The same by NumPy, which begins at once."""
    ids = input_ids.detach().numpy().astype(np.int64)
    real = np.ones(ids.shape, np.bool_) if mask is None else mask.detach().cpu().numpy() != 0
    if not real[:, -1].all():
        return HIDDEN
    if real.all():
        rows, places = list(ids), np.arange(ids.shape[1])
    else:
        rows, places = [row[kept] for row, kept in zip(ids, real, strict=True)], real.cumsum(1) - 1
    if positions is not None and not ((positions.detach().cpu().numpy() == places) | ~real).all():
        return NOT_FROM_0
    return rows, torch.from_numpy(real)


def _all(flags: Tensor) -> Tensor:
    """Whether all are set; as bytes, since a reduction of bools takes PyTorch twenty times as long on a CPU."""
    return flags.view(torch.uint8).amin().bool() if flags.numel() else flags.new_ones(())


def begin_alike(input_ids: Tensor, mask: Any, tokens: int) -> bool:
    """Whether two rows may have the same first `tokens` tokens: a look at these alone, which is quick to see that none do.

    Rows with gaps in their mask are not looked at.
    """
    begins, columns = input_ids[:, :tokens], input_ids.shape[1]
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        shown = mask.to(input_ids.device, torch.bool)
        gaps = ~_all(shown[:, 1:] >= shown[:, :-1])
        places = columns - shown.sum(1, keepdim=True) + torch.arange(tokens, device=shown.device)
        begins = input_ids.gather(1, places.clamp(max=columns - 1))
        begins = torch.cat((begins, gaps.to(begins.dtype).expand(len(begins), 1)), 1)
    looked = begins.to("cpu").numpy()
    if begins.shape[1] > tokens and looked[0, -1]:
        return True
    return len({row.tobytes() for row in looked}) < len(looked)


def why_not_model(model: Any, generation_config: Any, seen: Seen | None = None) -> str | None:
    """Why a token's keys may depend on more than the tokens before it.

    Args:
        seen: a look at the model as it is, if there was one.
    """
    runtime, seen = model._fastattn.runtime, look(model) if seen is None else seen
    if runtime.variants:
        # What its functions read may change between calls, and is not part of the weights.
        return "layers have attention variants"
    counted = seen.answer("counted", lambda: why_counted(model))
    if counted is not None:
        return counted
    if any(getattr(generation_config, name, False) for name in _ASKED_OF_PROMPT):
        return STATES
    if generation_config.prefill_chunk_size is not None:
        return "the call asks for a prompt in pieces"
    # PEFT puts its own on the model where it trains a prompt, which stands before every other.
    origin = prepared_by(model)
    if not origin.startswith("transformers."):
        return f"the model's inputs are prepared by {origin}"
    decoder = model._fastattn.decoder(model)
    if drops_cache(decoder):
        return "forwards drop the cache"
    return seen.answer("tokens", lambda: _why_not_modules(decoder)) or why_rows_differ(model, seen)


def _why_not_modules(decoder: Any) -> str | None:
    for module in submodules(decoder):
        state = vars(module)
        if state["_forward_pre_hooks"] and names_by_row(module) is not None:
            return "rows choose their adapters"
        reason = why_not_kind(module) if "rope_type" in state else None
        if reason is not None:
            return reason
    return None
