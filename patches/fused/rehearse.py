"""The kernels that a forward of a new size needs, compiled side by side before its layers run.

One layer of each kind is walked without launching anything: what it would launch is compiled by several threads meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.batch import Batch, BatchOptions, SharedPrefixes
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_groups import PrefixGroups
from hf_fastattn.graphs.drawn_offset import unmoved_offset
from hf_fastattn.graphs.module_checks import submodules, why_not_module
from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.pages.shared_runs import Run
from hf_fastattn.patches.fused.positions import attention_positions
from hf_fastattn.patches.modules.module_state import ModuleState
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import layers_of

Walk = Callable[[Iterable[Any], Tensor, dict[str, Any]], None]


def rehearse(decoder: Any, cache: PagedCache, states: Tensor, positions: dict[str, Any], walk: Walk) -> None:
    """Have the kernels compiled that a forward launches, and the steps after it, if it is the first of about this size.

    Args:
        cache: with a paged batch under way.
        states: `[B, S, hidden]` that the layers are given.
        positions: of the tokens, as attention takes them.
        walk: runs layers on states and positions, and changes nothing that the forward reads but by launches.
    """
    batch, device, rehearsed = cache.paged_batch, states.device, vars(decoder)[STATE].runtime.rehearsed
    assert batch is not None
    steps = not batch.is_decode and cache.steps_to_come > 0
    size = (steps, batch.is_decode, power_of_2(batch.tokens), power_of_2(batch.rows), device, region_dtype(device))
    if size in rehearsed:
        return
    rehearsed.add(size)
    # Not before: it imports Triton.
    from hf_fastattn.kernels.rehearsal import compile_ahead

    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # A linear attention leaves its states in the cache.
    if capturing or cache.recurrent_layers:
        return
    call = vars(decoder)[STATE].runtime.current
    layers = one_of_each_kind(decoder, cache)
    if any(why_not_module(module, device) for layer in layers for module in submodules(layer)):
        # Somebody else's code is called once.
        return

    def run() -> None:
        copies = None if call is None else call.copies
        # What takes longest is begun first: attention of the prompt, drawing, and attention of steps.
        _attention(cache, layers, states)
        if call is not None and call.rehearses_too is not None:
            call.rehearses_too()
        if steps:
            batch, tokens, position_ids = _step(cache, states, copies)
            with cache.using(batch):
                if batch.shared is not None:
                    _attention(cache, layers, tokens)
                walk(layers, tokens, _step_positions(decoder, cache, tokens, position_ids, positions))
        walk(layers, states, positions)

    with unmoved_offset(device):
        compile_ahead(device, run)
    # What one layer makes for the others was not made.
    batch.forget_tables()


def _attention(cache: PagedCache, layers: list[Any], states: Tensor) -> None:
    """What attention launches, where the dtype of its keys is known before there are any."""
    batch = cache.paged_batch
    assert batch is not None
    modules: list[Any] = [module for layer in layers for module in submodules(layer)]
    for module in modules:
        state = vars(module).get(STATE)
        if not isinstance(state, ModuleState) or not hasattr(module, "layer_idx"):
            continue
        if region_dtype(states.device) is not None or any(part.dtype != states.dtype for part in module.parameters()):
            continue
        config = module.config
        q, k = (
            states.new_empty(batch.tokens, heads, module.head_dim)
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        pages, window = cache.pages_of(module.layer_idx, k), cache.layers[module.layer_idx].window
        if not batch.is_short_step(q, pages[0], state.variant):
            batch.attend(q, *pages, window, scale=module.scaling, variant=state.variant)


def _step(cache: PagedCache, states: Tensor, copies: list[int] | None) -> tuple[Batch, Tensor, Tensor]:
    """A batch as of a step of the device's loop, its hidden states and positions; the tensors hold nothing.

    Args:
        states: of the prompt.
        copies: which of the prompt's rows each row goes on from, if that is not its own.
    """
    from hf_fastattn.kernels.attention.configs import short_heads
    from hf_fastattn.kernels.attention.workspace import Workspace
    from hf_fastattn.loop.device_state import bucket_of, columns_for

    device, rows = states.device, bucket_of(len(copies or cache.lengths))

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    # Tiles depend on how many keys a row can have.
    columns = columns_for(-(-cache.room // cache.groups.page_size))
    tensors = BatchTensors(
        slots={window: numbers(rows) for window in cache.tables},
        page_tables={window: numbers(rows, columns) for window in cache.tables},
        seq_lens=numbers(rows),
    )
    options = BatchOptions(cache.groups.backend, cache.groups.batch_invariant, workspace=Workspace(device))
    tokens, position_ids = states.new_zeros(rows, 1, states.shape[-1]), numbers(rows, 1).long()
    shared = None if copies is None else _shared(cache, copies, device)
    batch = Batch.static(tensors, rows, options, shared, short_heads(rows, cache.room), settled=True)
    return batch, tokens, position_ids


def _step_positions(
    decoder: Any, cache: PagedCache, tokens: Tensor, position_ids: Tensor, positions: dict[str, Any]
) -> dict[str, Any]:
    """What attention takes of the positions of a step, by what it took of those of the prompt."""
    if _may_be_called(decoder.rotary_emb, tokens.device):
        return attention_positions(decoder, cache, tokens, position_ids, tokens.device, True)
    cos = positions["position_embeddings"][0]
    unread = cos.new_zeros(len(tokens), 1, cos.shape[-1])
    return {"position_embeddings": (unread, unread), "position_ids": position_ids}


def _may_be_called(rotary: Any, device: torch.device) -> bool:
    """Whether a rotary embedding is as it was after a call; those whose frequencies depend on the length are not."""
    return isinstance(rotary, nn.Module) and why_not_module(rotary, device) is None


def _shared(cache: PagedCache, copies: list[int], device: torch.device) -> SharedPrefixes | None:
    """The prefixes of rows that go on from the same ones, as the loop will find them; None where each row reads its own."""
    keys = cache.groups.group(None).storage.any_pages() if None in cache.tables else None
    if keys is None or cache.groups.batch_invariant:
        return None
    size, lengths = cache.groups.page_size, cache.lengths_ahead
    runs, first = list[Run](), 0
    for past in range(1, len(copies) + 1):
        if past == len(copies) or copies[past] != copies[first]:
            whole = lengths[copies[first]] // size * size
            if past - first > 1 and whole:
                runs.append((first, past, whole))
            first = past
    groups = PrefixGroups(tuple(runs), 2 * keys[0, 0].nbytes).worthwhile()
    if not groups.groups:
        return None

    def numbers(count: int) -> Tensor:
        return torch.zeros((1, count), dtype=torch.int32, device=device)

    return SharedPrefixes(numbers(groups.group_count + 1), numbers(groups.group_count), groups.sharers)


def one_of_each_kind(decoder: Any, cache: PagedCache) -> list[Any]:
    """The first layer of every kind, by the classes of its modules and its window."""
    found: dict[Any, Any] = {}
    for index, layer in enumerate(layers_of(decoder)):
        found.setdefault((cache.layers[index].window, *map(type, submodules(layer))), layer)
    return list(found.values())
