"""Which prompts share pages with others and with earlier calls, and what stays of a call for those to come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_store import PrefixStore
from hf_fastattn.generation.prompt_tokens import begin_alike, tokens_of_rows, why_not_model, why_not_tokens
from hf_fastattn.generation.shared_prompt import Compute, SharedPrompt, tokens_in_common
from hf_fastattn.generation.users_code import may_be_users, runs_as_written
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.module_checks import SCALARS
from hf_fastattn.graphs.seen_modules import Seen, look
from hf_fastattn.pages.prefix_index import RowTokens, rows_of_tokens
from hf_fastattn.patches.modules.watched import why_rows_differ

# Tokens that a turn of its own has to save: a pass over the weights takes a large GPU as long as a few hundred tokens do.
WORTH_A_TURN, WORTH_ON_CPU = 512, 64


OTHER_STATE = "the model has changed on another rank, or its state is not known there"


@dataclass(frozen=True)
class KeptPrompt:
    """The prompt of a call whose pages stay.

    Attributes:
        rows: the tokens of each distinct row.
        copies: which of these each row of the batch is.
        paths: of each distinct row the pages of the index that hold it.
        takes: whether pages of these tokens too, computed with the model as it is, may be found from `root`.
    """

    store: PrefixStore
    root: int
    cache: PagedCache
    rows: list[RowTokens]
    copies: Sequence[int]
    paths: dict[int, list[int]]
    takes: Callable[[NDArray[np.int64]], bool]


def look_at_once(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """A look at the modules when `generate()` has just been called, if none of the user's code runs before the prompt.

    All that is asked of the modules until the prompt's first kernel follows from it. Where the prompt is likely to be served
    from pages of earlier calls, the weights are looked at from here on too.

    Args:
        args: of `generate()`; `kwargs` likewise.
    """
    runtime = model._fastattn.runtime
    call, plain = runtime.current, all(map(_is_plain, (*args, *kwargs.values())))
    if call is None or model.training or not plain or "custom_generate" in kwargs or not runs_as_written(type(model)):
        return
    if runtime.prefixes is None and not runtime.graphs.records_on(model.device):
        # Nothing is compared with what was found before.
        return
    seen = look(model)
    if not seen.is_sure or not seen.answer("has no functions", lambda: _has_no_functions(model)):
        return
    if runtime.prefixes is None:
        call.seen = seen
    else:
        _begin(model, call, seen)


def look_ahead(model: Any, cache: Any) -> None:
    """Begin to look at the weights where the prompt of a call is likely to be served from pages of earlier ones."""
    runtime = model._fastattn.runtime
    call = runtime.current
    if model.training or not isinstance(cache, PagedCache) or cache.get_seq_length():
        call.seen = None
    elif call.seen is None and runtime.prefixes is not None:
        _begin(model, call, look(model))


def _begin(model: Any, call: Any, seen: Seen) -> None:
    call.seen = seen
    model._fastattn.runtime.model_state.begin(model._fastattn.decoder(model), seen)


def _is_plain(value: Any) -> bool:
    """Whether nothing of the user's can run when `generate()` looks at an argument."""
    if value is None or type(value) in (*SCALARS, Tensor, GenerationConfig):
        return True
    # Their entries are not called before the prompt is computed.
    return type(value) in (list, LogitsProcessorList, StoppingCriteriaList)


def _has_no_functions(model: Any) -> bool:
    """Whether a model is one of text without functions in the place of its methods."""
    return not any(map(callable, vars(model).values())) and model.config.get_text_config(decoder=True) is model.config


def compute_prompt(
    model: Any,
    cache: PagedCache,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    generation_config: Any,
    copies: list[int] | None,
    compute: Compute,
) -> Any:
    """The outputs of a prompt of distinct rows, each page of which is computed once if that pays.

    Args:
        cache: new and empty.
        copies: which of the rows each row of the batch is a copy of, if there are equal ones.
        compute: the prompt's forward.
    """
    runtime, call = model._fastattn.runtime, model._fastattn.runtime.current
    keep = runtime.config.prefix_cache and not model.training
    wanted = keep or (len(input_ids) > 1 and runtime.shares_rows)
    given = None
    if call is not None:
        given, call.seen = call.seen, None
    found = _rows(model, cache, input_ids, model_kwargs, generation_config, keep, given) if wanted else None
    root = _root(model, cache, found[0], found[3]) if keep and found is not None else 0
    if keep and runtime.ranks is not None and not runtime.ranks.alike([int(found is None), root]):
        # A rank whose weights have changed, or may have, looks for nothing, or elsewhere.
        runtime.close_prefixes()
        runtime.counters.prefix_unused[OTHER_STATE] += found is not None
        found = None
    if found is None:
        with _looked(model, call, given):
            return compute(input_ids, model_kwargs)
    rows, shown, worth, seen = found
    new_cache = functools.partial(runtime.new_cache, model, 0, 0, templates=cache.templates)
    if not keep:
        with closing(PrefixStore(cache.groups)) as store, _looked(model, call, given):
            prompt = SharedPrompt(new_cache, cache, store, -1, rows, shown, worth)
            return prompt.compute(compute, input_ids, model_kwargs)
    kept = runtime.prefix_store(cache.groups)
    prompt = SharedPrompt(new_cache, cache, kept, root, rows, shown, worth)
    copies = list(range(len(rows))) if copies is None else copies
    takes = functools.partial(_takes, model, kept, root)
    call.prompt = KeptPrompt(kept, root, cache, rows, copies, prompt.paths, takes)
    # No module has hooks of a user's, or the state would not be known.
    with _looked(model, call, seen):
        return prompt.compute(compute, input_ids, model_kwargs)


@contextmanager
def _looked(model: Any, call: Any, seen: Seen | None) -> Iterator[None]:
    """While the prompt's forwards run, what is asked of the modules follows from a look, if there was one."""
    if call is None or seen is None:
        yield
        return
    decoder, device = model._fastattn.decoder(model), model.device
    call.seen = seen
    try:
        with model._fastattn.runtime.graphs.knowing(decoder, device, fingerprint_of(decoder, device, seen)):
            yield
    finally:
        call.seen = None


def _root(model: Any, cache: PagedCache, rows: list[RowTokens], seen: Seen) -> int:
    """The beginning of pages that were made in the state of the model as it is, for prompts of these rows."""
    runtime, decoder = model._fastattn.runtime, model._fastattn.decoder(model)
    tokens = np.concatenate([row.ids for row in rows])
    root: int = runtime.prefix_store(cache.groups).root_of(*runtime.model_state.of(decoder, decoder.device, seen, tokens))
    return root


def _takes(model: Any, store: PrefixStore, root: int, tokens: NDArray[np.int64]) -> bool:
    return store.takes(root, model._fastattn.runtime.model_state.rows(model._fastattn.decoder(model), tokens))


def _rows(
    model: Any,
    cache: PagedCache,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    generation_config: Any,
    keep: bool,
    seen: Seen | None,
) -> tuple[list[RowTokens], Tensor, int, Seen] | None:
    """The rows' tokens, where they stand, what a turn has to save, and the look; None if nothing is shared, or may be."""
    runtime = model._fastattn.runtime
    reason = None if runtime.is_private(cache) else "the cache is the user's"
    if cache.record_past:
        # An assistant may run some of the layers alone.
        reason = "the call drafts for another one"
    reason = reason or why_not_tokens(input_ids, model_kwargs, cache, model.config)
    size = cache.groups.page_size
    if reason is None and not keep and not begin_alike(input_ids, model_kwargs.get("attention_mask"), size):
        return None
    found: Any = reason
    if reason is None:
        found = tokens_of_rows(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    if not isinstance(found, str):
        worth = WORTH_ON_CPU if input_ids.device.type == "cpu" else WORTH_A_TURN
        rows = rows_of_tokens(found[0], size)
        if not keep and tokens_in_common(rows, size) < worth:
            return None
        seen = look(model) if seen is None else seen
        reason = why_not_model(model, generation_config, seen)
        if reason is None and keep:
            reason = runtime.model_state.why_not(model._fastattn.decoder(model), seen, model)
        if reason is None:
            return rows, found[1], worth, seen
        found = reason
    if keep:
        runtime.counters.prefix_unused[found] += 1
    runtime.note(f"prefixes of the prompt are not looked for: {found}")
    return None


def kept_prompt(model: Any, cache: Any) -> KeptPrompt | None:
    """The prompt of the call under way in `cache`, if its pages stay."""
    call = model._fastattn.runtime.current
    kept: KeptPrompt | None = None if call is None else call.prompt
    return kept if kept is not None and kept.cache is cache else None


def keep_generated(model: Any, cache: Any, prompt_columns: int, result: Any, ran: Iterable[Any]) -> None:
    """What a call has generated stays with its prompt, if the cache holds its rows in the order of the result.

    Args:
        ran: processors, criteria, streamer and loop of the call. Between two tokens a user's may have changed the model,
            and changed it back: then only the prompt stays.
    """
    kept = kept_prompt(model, cache)
    if kept is None or any(map(may_be_users, ran)):
        return
    # Of a call of one token there is nothing but its prompt.
    grown = cache.dense is not None or cache.lengths != [len(kept.rows[copy]) for copy in kept.copies]
    if grown and why_rows_differ(model) is not None:
        return
    sequences = result if isinstance(result, Tensor) else result.sequences
    if len(sequences) == len(cache.lengths):
        new = sequences[:, prompt_columns:].to("cpu", torch.int64).numpy()
        for row, tokens in enumerate(new):
            keep_row(kept, row, row, tokens)


def keep_row(kept: KeptPrompt, place: int, number: int, new: NDArray[np.int64]) -> None:
    """Row `place` of the cache stays: row `number` of the batch, and the `new` tokens after its prompt that it holds."""
    cache, prompt, found = kept.cache, kept.rows[kept.copies[number]], kept.paths.get(kept.copies[number], [])
    count = cache.lengths[place] if cache.dense is None else 0
    if count > len(prompt) and not kept.takes(new[: count - len(prompt)]):
        # Embeddings of these tokens are others than those that pages were computed with before.
        return
    if len(prompt) <= count <= len(prompt) + len(new):
        kept.store.index.insert(kept.root, prompt.longer(new, count), cache.tables[None].rows[place], count, True, found)
