"""Whether the outcomes of a step are the same on both sides."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

import hf_fastattn
from tests.fuzz.side import CACHE, Outcome, Side

# In fp64 what Transformers computes in fp32 all the same, such as recurrent states.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 2e-5}
# As much more for keys and values behind layers with such states.
BEHIND_STATES = 2.5
# Which of stock's errors a clearer one of ours may stand for, where stock fails somewhere inside.
CLEARER = ("ValueError", "TypeError")
# What stock refuses for any model with linear attention, and we only where pages do not keep the states.
STATEFUL = "assisted generation is not supported with stateful models"
# Errors of stock that come from deep inside, where ours may fail in other words.
INSIDE = ("RuntimeError", "IndexError", "AttributeError", "KeyError")


def difference(stock: Outcome, ours: Outcome, limited: bool) -> str | None:
    """What differs; None if nothing does.

    Args:
        limited: a memory limit may really be too small.
    """
    if ours.error != stock.error:
        problem = _errors_differ(stock, ours, limited)
        if problem is not None or ours.error is not None or stock.error is not None:
            return problem
    if limited and isinstance(ours.result, list) and "CacheFullError" in map(str, ours.result):
        # Of two threads.
        return None
    if ours.error is None:
        problem = _same(stock.result, ours.result, "result", stock.mask)
        if problem is not None:
            return problem
    # Ours is refused once the cache is known, when a streamer has been given the prompt.
    refused = ours.error is not None and ours.error[1].startswith(STATEFUL)
    problem = None if refused else _same(stock.seen, ours.seen, "seen", None)
    if problem is None and not torch.equal(stock.random, ours.random):  # type: ignore[arg-type]
        problem = "torch's random generator is in another state"
    if problem is None and ours.error is None:
        problem = caches_differ(stock.cache, ours.cache, stock.mask)
    return problem


def _errors_differ(stock: Outcome, ours: Outcome, limited: bool) -> str | None:
    theirs, mine = stock.error, ours.error
    if mine is not None and mine[0] == "CacheFullError" and limited:
        return None
    if theirs is not None and (theirs[1].startswith(STATEFUL) or (mine is None and theirs[0] in INSIDE)):
        return None
    if theirs is None or mine is None:
        return f"stock {theirs or 'works'}, ours {mine or 'works'}"
    return None if theirs[0] == mine[0] or mine[0] in CLEARER or theirs[0] in INSIDE else f"stock {theirs}, ours {mine}"


def _same(stock: Any, ours: Any, name: str, mask: Tensor | None) -> str | None:
    if isinstance(stock, Tensor):
        return _same_tensor(stock, ours, name, mask)
    if hasattr(stock, "keys") and hasattr(stock, "items"):
        if list(stock.keys()) != list(ours.keys()):
            return f"{name} has {list(ours.keys())}, stock {list(stock.keys())}"
        return _first(_same(stock[key], ours[key], key, mask) for key in stock if key != CACHE)
    if isinstance(stock, list | tuple):
        if len(stock) != len(ours):
            return f"{name} has {len(ours)} entries, stock {len(stock)}"
        return _first(_same(a, b, f"{name}[{i}]", mask) for i, (a, b) in enumerate(zip(stock, ours, strict=True)))
    return None if stock == ours else f"{name} is {ours}, stock {stock}"


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _same_tensor(stock: Tensor, ours: Any, name: str, mask: Tensor | None) -> str | None:
    if not isinstance(ours, Tensor) or ours.shape != stock.shape or ours.dtype != stock.dtype:
        got = (tuple(ours.shape), ours.dtype) if isinstance(ours, Tensor) else ours
        return f"{name} is {got}, stock {tuple(stock.shape)} {stock.dtype}"
    if not stock.is_floating_point():
        return None if torch.equal(stock, ours) else f"{name} differ: {ours.tolist()}, stock {stock.tolist()}"
    shown = _shown(stock, mask) if name.startswith(("hidden_states", "attentions", "logits")) else None
    if shown is not None:
        stock, ours = stock[shown], ours[shown]
    return _far(stock, ours, name)


def _shown(tensor: Tensor, mask: Tensor | None) -> Any:
    """Where a tensor `[B, S, ..]` or `[B, H, S, K]` is of real tokens; steps of one token behind a prompt are."""
    columns = 2 if tensor.ndim == 4 else 1
    if mask is None or tensor.ndim < 3 or tensor.shape[columns] > mask.shape[1]:
        return None
    if tensor.shape[columns] == 1 < mask.shape[1]:
        return None
    copies = tensor.shape[0] // mask.shape[0]
    real = mask.repeat_interleave(copies, 0)[:, -tensor.shape[columns] :].bool()
    return real[:, None].expand(tensor.shape[:3]) if columns == 2 else real


def _far(stock: Tensor, ours: Tensor, name: str, factor: float = 1.0) -> str | None:
    finite = stock.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return f"{name}: {int((ours.isfinite() != finite).sum())} values are finite on one side alone"
    if not bool(finite.any()):
        return None
    error, size = (ours - stock)[finite].abs().max().item(), stock[finite].abs().max().item()
    limit = factor * TOLERANCE.get(stock.dtype, 1e-2) * max(size, 1.0)
    return None if error <= limit else f"{name} is off by {error:.2g} (values up to {size:.2g})"


def caches_differ(stock: Any, ours: Any, mask: Tensor | None) -> str | None:
    """Whether two caches hold other keys or values at visible columns."""
    try:
        return _caches_differ(stock, ours, mask)
    except Exception as error:
        return f"reading a cache fails: {type(error).__name__}: {error}"


def _caches_differ(stock: Any, ours: Any, mask: Tensor | None) -> str | None:
    if stock is None or ours is None:
        return None if ours is stock else f"a cache is on one side alone: stock {type(stock)}, ours {type(ours)}"
    length = stock.get_seq_length()
    if int(ours.get_seq_length()) != int(length):
        return f"the cache has {ours.get_seq_length()} columns, stock {length}"
    if len(ours.layers) != len(stock.layers):
        return f"the cache has {len(ours.layers)} layers, stock {len(stock.layers)}"
    factor = BEHIND_STATES if any(isinstance(layer, LinearAttentionLayer) for layer in stock.layers) else 1.0
    for index, (theirs, mine) in enumerate(zip(stock.layers, ours.layers, strict=True)):
        for name in ("keys", "values"):
            a, b = getattr(theirs, name, None), getattr(mine, name, None)
            if not isinstance(a, Tensor) or not a.numel():
                continue
            if not isinstance(b, Tensor) or a.shape != b.shape:
                return f"{name} of layer {index} are {None if b is None else tuple(b.shape)}, stock {tuple(a.shape)}"
            problem = _far(*_visible(a, b, mask, length), f"{name} of layer {index} in the cache", factor)
            if problem is not None:
                return problem
    return None


def _visible(stock: Tensor, ours: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    if mask is None or stock.shape[0] % mask.shape[0]:
        return stock, ours
    copies = stock.shape[0] // mask.shape[0]
    grown = torch.ones(stock.shape[0], max(length, mask.shape[1]), dtype=torch.bool)
    grown[:, : mask.shape[1]] = mask.bool().repeat_interleave(copies, 0)
    shown = grown[:, :length][:, -stock.shape[2] :]
    if shown.shape[1] < stock.shape[2]:
        return stock, ours
    return stock.transpose(1, 2)[shown], ours.transpose(1, 2)[shown]


def books_differ(side: Side, outcome: Outcome) -> str | None:
    """Whether the pages' books contradict one another, or pages are held with no cache alive."""
    if not side.is_patched:
        return None
    runtime = side.base._fastattn.runtime
    alive = side.cache is not None or outcome.cache is not None
    if not alive and any(group.pool.in_use for group in runtime.groups):
        gc.collect()
    try:
        # Pages of caches that are gone are taken back when somebody asks.
        kept = hf_fastattn.report(side.base).pages_kept
    except Exception as error:
        return f"books: report() raises {type(error).__name__}: {error}"
    for group in runtime.groups:
        pool = group.pool
        owned = [count > 0 for count in pool._owners]
        if sum(owned) != pool.in_use or owned != [bool(held) for held in pool._held]:
            return f"books: {pool.in_use} in use, {sum(owned)} owned, {sum(pool._held)} held"
    in_use = sum(group.pool.in_use for group in runtime.groups)
    if not alive and in_use != kept:
        return f"books: {in_use} pages are in use, {kept} of them kept, and no cache is alive"
    if getattr(runtime, "in_call", False):
        return "books: a call is still listed"
    return "books: the prefilling flag is stuck" if getattr(runtime, "prefilling", False) else None
