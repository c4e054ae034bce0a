"""Keys and values between pages and Transformers' dense layers, layer by layer: memory holds one layer twice at most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_fastattn.cache.cache_state import CacheState
from hf_fastattn.cache.dense_layers import DenseLayers, fill_layer, window_of
from hf_fastattn.cache.dense_tokens import is_run
from hf_fastattn.cache.hidden_columns import Hidden
from hf_fastattn.kernels.page_formats import is_eight_bits, write_tokens
from hf_fastattn.pages.model_layout import is_recurrent, template_layers
from hf_fastattn.pages.page_pool import CacheFullError
from hf_fastattn.transformers_version import CACHE


def why_not_lent(cache: Any, config: Any) -> str | None:
    """Why a user's cache is not one that pages can stand in for; None if it is an ordinary `DynamicCache` of the model."""
    if type(cache) is not DynamicCache or cache.offloading:
        return f"{CACHE} is {'an offloaded' if getattr(cache, 'offloading', False) else 'a'} {type(cache).__name__}"
    templates = template_layers(config)
    grows = cache.layer_class_to_replicate is DynamicLayer and all(type(layer) is DynamicLayer for layer in templates)
    if len(cache.layers) > len(templates) or (len(cache.layers) < len(templates) and not grows):
        return f"{CACHE} is a DynamicCache of {len(cache.layers)} layers, and the model has {len(templates)}"
    for index, (layer, template) in enumerate(zip(cache.layers, templates, strict=False)):
        held, window = (getattr(either, "sliding_window", None) for either in (layer, template))
        if type(layer) is not type(template):
            return f"layer {index} of {CACHE} is a {type(layer).__name__}, and that of the model a {type(template).__name__}"
        if held != window:
            return f"layer {index} of {CACHE} has a window of {held} tokens, and that of the model one of {window}"
        if is_recurrent(layer) and layer.number_of_states != template.number_of_states:
            return f"layer {index} of {CACHE} has {layer.number_of_states} states, not {template.number_of_states}"
    return None


def shown_columns(mask: Any, rows: int, columns: int) -> Tensor | None:
    """`[rows, columns]` bool on the host, what a mask shows of them; None if that is all, or the mask is another's."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < columns:
        return None
    shown = mask[:, :columns].to("cpu", torch.bool)
    return None if bool(shown.all()) else shown


def read_layers(cache: CacheState, layers: DenseLayers) -> None:
    """Fill `layers` from the pages of `cache`, which gives up what memory it can as it goes."""
    shown, alone = cache.shown_states(), {window: cache.owns_all_pages(window) for window in cache.tables}
    for index, layer in layers.layers.items():
        view = cache.layers[index]
        # Whoever has the tensors may write into them later.
        dense = shown.get(index) or cache.dense_layer(view)
        if dense is None:
            continue
        hidden = cache.hidden.get(index)
        if hidden is not None and index not in shown:
            hidden.put_back(cache.get_seq_length() - dense[0].shape[2], *dense)
        fill_layer(layer, *dense, cache.get_seq_length(), cache.record_past)
        if alone[view.window]:
            cache.groups.group(view.window).storage.forget(index)


def write_pages(cache: CacheState, layers: DenseLayers, stored: Tensor | None) -> None:
    """Move what `layers` hold into pages of `cache`, which is empty; the layers are left without tensors.

    Args:
        stored: `[B, columns]` bool on the host, the columns to store; None for all.

    Raises:
        CacheFullError: the pages do not fit into the memory limit; nothing was moved.
    """
    columns, rows = layers.columns, layers.batch_size
    counts = [columns] * rows if stored is None else stored.sum(1).tolist()
    moved: list[Any] = []
    held = {window: layers.columns_held(window) for window in cache.tables}
    kept = {window: _tokens_in(counts, stored, columns - held[window]) for window in cache.tables}
    try:
        _reserve(cache, counts, kept, cache.ahead_of(columns))
        slots: dict[tuple[Any, torch.device], Tensor] = {}
        for index, layer in layers.layers.items():
            key = (window_of(layer), layer.keys.device)
            if key not in slots:
                slots[key] = _slots(cache, key[0], counts, kept[key[0]]).to(key[1])
            shown = None if stored is None else stored[:, columns - layer.keys.shape[2] :]
            if shown is not None and cache.lent is not None:
                _keep_hidden(cache, index, layer, shown, columns)
            _write_layer(cache, index, layer.keys, layer.values, shown, slots[key])
            moved.append((index, layer, columns - layer.keys.shape[2]))
            layer.keys = layer.values = None
        cache.note_pages(counts, columns, stored, columns - min(held.values()))
    except BaseException as error:
        for index, layer, first in moved:
            dense = cache.read_columns(cache.layers[index], first, columns, stored)
            layer.keys, layer.values = dense
            if index in cache.hidden:
                cache.hidden[index].put_back(first, *dense)
        cache.drop_pages()
        if isinstance(error, CacheFullError):
            raise CacheFullError(cache.groups.describe_full(counts)) from error
        raise


def write_past(cache: CacheState, index: int, states: tuple[Tensor, Tensor]) -> None:
    """Write `[B, G, L, D]` keys and values of the last columns before the forward under way into pages of layer `index`.

    Raises:
        RuntimeError: others read these pages too.
    """
    layer, columns, stored = cache.layers[index], cache.past_columns, cache.stored
    first = columns - states[0].shape[2]
    table, pool = cache.tables[layer.window], cache.groups.group(layer.window).pool
    if any(pool.owners(page) > 1 for pages in table.rows for page in pages if page >= 0):
        raise RuntimeError(
            f"keys or values of layer {index} of {CACHE} were written while a forward was under way that had not reached "
            "the layer, and rows or other caches share their pages; write them before the forward"
        )
    held = _tokens_in(cache.lengths, stored, first)
    slots = _slots(cache, layer.window, cache.lengths, held).to(states[0].device)
    _write_layer(cache, index, *states, None if stored is None else stored[:, first:], slots)


def _reserve(cache: CacheState, counts: list[int], kept: dict[int | None, list[int]], ahead: int) -> None:
    size = cache.groups.page_size
    for window, table in cache.tables.items():
        behind = [(count - held) // size for count, held in zip(counts, kept[window], strict=True)]
        table.add_rows(len(counts))
        table.start_behind(behind)
        first = [pages * size for pages in behind]
        group = cache.groups.group(window)
        table.reserve(first, counts, ahead, cache.counters, group.copy_pages)


def _tokens_in(counts: list[int], stored: Tensor | None, first: int) -> list[int]:
    """Tokens of each row from column `first` on."""
    return [count - first for count in counts] if stored is None else stored[:, first:].sum(1).tolist()


def _slots(cache: CacheState, window: int | None, counts: list[int], held: list[int]) -> Tensor:
    """`[T]` slots of the last `held[b]` of the `counts[b]` tokens of each row."""
    size = cache.groups.page_size
    within = torch.arange(size, device="cpu")
    rows = cache.tables[window].rows
    return torch.cat(
        [
            (torch.tensor(pages, dtype=torch.int64, device="cpu")[:, None] * size + within).flatten()[count - kept : count]
            for pages, count, kept in zip(rows, counts, held, strict=True)
        ]
    )


def _write_layer(
    cache: CacheState, index: int, keys: Tensor, values: Tensor, shown: Tensor | None, slots: Tensor
) -> None:
    # Pages are looked up by the shape [.., heads, head dim].
    held = cache.pages_for(index, keys.transpose(1, 2))
    with torch.no_grad():
        if is_eight_bits(held[0]):
            write_tokens(*held, slots, *(_tokens_of(states, shown) for states in (keys, values)))
            return
        for pages, states in zip(held, (keys, values), strict=True):
            tokens = _tokens_of(states, shown)
            if slots.device.type == "cpu" and is_run(slots):
                pages.flatten(0, 1)[int(slots[0]) :][: len(slots)].copy_(tokens)
            else:
                pages.flatten(0, 1).index_copy_(0, slots, tokens)


def _tokens_of(states: Tensor, shown: Tensor | None) -> Tensor:
    """`[B, G, L, D]` as the tokens `[T, G, D]` that are shown."""
    tokens = states.transpose(1, 2)
    # Of a single row this is a view.
    tokens = tokens[0] if len(tokens) == 1 else tokens.flatten(0, 1)
    return tokens if shown is None else tokens[shown.flatten().to(tokens.device)]


def _keep_hidden(cache: CacheState, index: int, layer: Any, shown: Tensor, columns: int) -> None:
    first = columns - shown.shape[1]
    where = torch.nn.functional.pad(~shown, (first, 0))
    if bool(where.any()):
        cache.hidden[index] = Hidden.of(where, first, layer.keys.detach(), layer.values.detach())
