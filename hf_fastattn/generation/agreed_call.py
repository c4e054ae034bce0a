"""`agreed_path`: whether all ranks that compute a model together see the same call, and the same model, before its prompt.

What is computed, and in which order, has to be the same on each: sums over ranks have no names, so one of another size, or
one more, is taken for another rank's. Transformers' forwards are the same whatever hooks a rank has; ours are not (padding
leaves the batch, equal rows are computed once, steps are recorded). So where ranks differ, all of them run Transformers'
path.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.autocast import autocast_as, forward_dtype, region_dtype
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.generation.drawn_alike import digest_of_draws, draw_alike
from hf_fastattn.graphs.module_checks import has_global_hooks, why_not_kind
from hf_fastattn.pages.model_layout import keys_dtype
from hf_fastattn.parallel.understood import last_look
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.patches.modules.watched import why_rows_differ, why_watched
from hf_fastattn.transformers_version import CACHE

ALONE = "tensor parallel: on this rank alone, "
ELSEWHERE = "tensor parallel: another rank differs from this one: its report has the reason"
DIFFER = "tensor parallel: ranks differ in "
# Options of a call that ranks may be given differently, since they change no forward.
OWN = frozenset((
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "cache_implementation", "cache_config", "compile_config", "disable_compile", "transformers_version", "max_new_tokens",
    "continuous_batching_config",
))  # fmt: skip
DRAWN = frozenset(("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"))


def agreed_path(
    model: Any, reason: str | None, generation_config: Any, mode: Any, model_kwargs: dict[str, Any]
) -> str | None:
    """Why the call has to keep Transformers' cache, on this rank or on another one; None if it may have pages.

    What ranks recorded so far, and their pages, are compared too: where they differ, all let go of them, so that they record
    the same forwards anew. Of draws, those of rank 0 count.

    Args:
        model: patched, and spread over ranks.
        reason: that there is on this rank; "" for the user's own pages.
        generation_config: of the call, `mode` and `model_kwargs` likewise, as `_prepare_cache_for_generation` has them.

    Raises:
        ValueError: ranks were patched with other options, or asked for different things.
    """
    runtime = model._fastattn.runtime
    ranks, call = runtime.ranks, runtime.current
    reasons, facts = _reasons(model, reason or None), _facts(model, model_kwargs)
    draws = digest_of_draws(model.device) if generation_config.do_sample else 0
    asked = _asked(call, generation_config, mode, model_kwargs)
    mine = [_digest(runtime.config), asked, draws, _digest(reasons), *map(_digest, facts.values()), *runtime.history]
    found = ranks.gathered(mine)
    first_fact, first_of_history = 4, 4 + len(facts)
    other = _other(found, mine, slice(0, 1))
    if other is not None:
        raise ValueError(
            f"the model was patched with other options on rank {other} than on this one; give patch() the same on every rank"
        )
    other = _other(found, mine, slice(1, 2))
    if other is not None:
        raise ValueError(
            f"generate() was called with another prompt or other options on rank {other} than on this one; processes that "
            "compute one model together need the same call on each: give every rank the same input_ids and options"
        )
    if _other(found, mine, slice(2, 3)) is not None:
        runtime.note("ranks have different random numbers: those of rank 0 are drawn on all of them")
        draw_alike(call, ranks, model.device)
    if _other(found, mine, slice(first_of_history, None)) is not None:
        runtime.forget_recorded()
    if _other(found, mine, slice(3, first_of_history)) is None:
        return reason
    why = next((f"{ALONE}{why}" for why in reasons if why), ELSEWHERE)
    if _other(found, mine, slice(3, 4)) is None:
        names = [
            name for place, name in enumerate(facts, first_fact) if _other(found, mine, slice(place, place + 1)) is not None
        ]
        why = f"{DIFFER}{', '.join(names)}"
    call.why_apart = why
    if isinstance(model_kwargs.get(CACHE), PagedCache):
        call.why_dense = why
    return why


def _reasons(model: Any, reason: str | None) -> tuple[str | None, ...]:
    """What is decided by, of the model's modules, as reasons."""
    runtime = model._fastattn.runtime
    graphs, steps, ranks = runtime.graphs, runtime.loop_graphs, runtime.ranks
    decoder, region = model._fastattn.decoder(model), region_dtype(model.device)
    with autocast_as(model.device, forward_dtype(model)):
        unchanged = steps.check(model, model.device)
    # The decoder is a part of the model: one of the two is looked at before each prompt, as without ranks.
    graphs.check(decoder, decoder.device, unchanged and ranks.checked_in == [region])
    ranks.checked_in = [region]
    kept, seen = ranks.kept, last_look(model)
    if kept is None or kept[0] is not seen:
        # To ask all modules takes the host milliseconds.
        kept = seen, (why_rows_differ(model), why_watched(decoder), fused_reason(decoder), why_not_kind(model))
        ranks.kept = kept
    return (reason, graphs.reason, steps.reason, *kept[1])


def _facts(model: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same of what is no reason by itself, by what it is."""
    runtime, cache = model._fastattn.runtime, model_kwargs.get(CACHE)
    decoder = model._fastattn.decoder(model)
    held = [group.pool.in_use for group in runtime.groups]
    if runtime.prefixes is not None:
        held = [pages - len(runtime.prefixes.index) for pages in held]
    dtypes = (model.dtype, keys_dtype(model), region_dtype(model.device), forward_dtype(model))
    return {
        "train mode": (model.training, decoder.training, drops_cache(decoder)),
        "hooks on all modules": has_global_hooks(),
        "dtype or autocast": dtypes,
        "tokens in past_key_values": 0 if cache is None else int(cache.get_seq_length()),
        "pages that other caches hold": held,
        "arguments": sorted(name for name, value in model_kwargs.items() if value is not None and name != CACHE),
        "rows": (runtime.graphs.adapter_names, runtime.shares_rows, runtime.row_limits),
    }


def _asked(call: Any, generation_config: Any, mode: Any, model_kwargs: dict[str, Any]) -> int:
    """A number for what the call asks for, the same in every process."""
    options = sorted(
        (name, repr(value))
        for name, value in vars(generation_config).items()
        if not name.startswith("_") and name not in OWN and (generation_config.do_sample or name not in DRAWN)
    )
    tensors = {"input_ids": call.input_ids}
    tensors |= {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids", "inputs_embeds")}
    given = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    # The device is waited for once.
    sums = torch.stack([_sum_of(value) for value in given.values()]).tolist()
    return _digest((mode.value, call.synced, options, [(name, *value.shape) for name, value in given.items()], sums))


def _sum_of(tensor: Tensor) -> Tensor:
    """A number that depends on the entries and their places; 0 of what ranks may have computed in another order."""
    if tensor.is_floating_point():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return tensor.flatten().to(torch.int64).cumsum(0).sum()


def _digest(values: Any) -> int:
    return zlib.crc32(repr(values).encode())


def _other(found: Sequence[Sequence[int]], mine: Sequence[int], part: slice) -> int | None:
    """The first rank whose values differ there from this one's."""
    return next((rank for rank, values in enumerate(found) if list(values[part]) != list(mine[part])), None)
