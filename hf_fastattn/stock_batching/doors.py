"""What lets `attn_implementation="fastattn"` into Transformers' own continuous batching.

Transformers takes `sdpa`, `paged|eager` and names that contain "flash"; for these last it makes no masks, records CUDA
graphs, and lets decode steps read pages in place. Our name is none, so a few functions of its module are wrapped, once a
process: where the model's attention is ours they decide as for a flash implementation, or make our cache; for every other
name they are Transformers' own, called with what they were given.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching import continuous_api, initialization, model_runner

from hf_fastattn.dense.interface_counters import counters
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.stock_batching.page_cache import StockPages

NAME = "fastattn"
# Before 5.23 Transformers puts the second before the names of what serves a batch of requests.
NAMES = (NAME, f"paged|{NAME}")
# Models that repeat keys between their cache and their attention, as they need not for gathered ones.
CHANGES_KEYS = ("jetmoe",)
# The argument of the attention function that is added to scores.
BIAS = "position_bias"
logger = logging.getLogger("hf_fastattn")
_opening = threading.Lock()
# Whether CUDA graphs may be made of the model whose manager is being made, in this thread.
_manager = threading.local()


def open_doors() -> None:
    """Wrap Transformers' functions; again is a no-op."""
    with _opening:
        _wrap_all()


@functools.cache
def _wrap_all() -> None:
    doors: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (cache_module, "is_flash_attention_requested", _is_flash),
        (initialization, "is_flash_attention_requested", _is_flash_to_resolve),
        (initialization, "ensure_decode_fast_path_is_available", _keep_block_table),
        (continuous_api, "PagedAttentionCache", _make_cache),
        (model_runner.ModelRunner, "compute_batch", _compute_batch),
        (model_runner.ModelRunner, "run_one_warmup", _run_one_warmup),
        (continuous_api.ContinuousBatchingManager, "_create_batch_processor", _create_batch_processor),
        (continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch),
    )
    missing = [name for owner, name, _ in doors if not hasattr(owner, name)]
    if missing:
        logger.warning("continuous batching does not take attn_implementation=%r: no %s in this Transformers", NAME, missing)
        return
    for owner, name, function in doors:
        _wrap(owner, name, function)


def is_ours(config: Any) -> bool:
    """Whether a model with this config, or this part of a model, has our attention."""
    return getattr(config, "_attn_implementation", None) in NAMES


def _wrap(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put `function(original, ...)` in the place of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _is_flash(original: Any, config: Any = None, *args: Any, **kwargs: Any) -> bool:
    return is_ours(config) or original(config, *args, **kwargs)


def _is_flash_to_resolve(original: Any, config: Any = None, *args: Any, **kwargs: Any) -> bool:
    if is_ours(config):
        return getattr(_manager, "records", False)
    return original(config, *args, **kwargs)


def _keep_block_table(original: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    if not is_ours(config):
        original(config, *args, **kwargs)


def _make_cache(original: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    kind = _pages_class() if is_ours(config) else original
    return kind(config, *args, **kwargs)


@functools.cache
def _pages_class() -> type[StockPages]:
    if hasattr(cache_module, "ATTN_TYPE_TO_ALLOCATOR"):
        from hf_fastattn.stock_batching.page_cache_new import NewPages

        return NewPages
    from hf_fastattn.stock_batching.page_cache_old import OldPages

    return OldPages


def _compute_batch(original: Any, self: Any, model: Any, batch_data: dict[str, Any]) -> None:
    if not isinstance(self.cache, StockPages):
        return original(self, model, batch_data)
    if batch_data.get("attention_mask") is None:
        # Before 5.24 models make masks that nobody reads, unless there is one of four dimensions.
        batch_data["attention_mask"] = self.cache.unread_mask
    original(self, model, batch_data)
    counters.batches[self.cache.take_reads(batch_data)] += 1


def _run_one_warmup(original: Any, self: Any, model: Any, num_q_tokens: int, max_kv_read: int | None) -> float:
    if isinstance(self.cache, StockPages) and max_kv_read is not None:
        # A request that fills the cache would take seconds to compute, and asks for no more memory: nothing is gathered.
        max_kv_read = min(max_kv_read, self.cache.pages_of(0)[0].shape[1])
    return original(self, model=model, num_q_tokens=num_q_tokens, max_kv_read=max_kv_read)


def _create_batch_processor(original: Any, self: Any) -> Any:
    processor = original(self)
    if isinstance(processor.cache, StockPages):
        processor.cache.limit_scheduler(processor.scheduler)
        _settle(self.model.device)
    return processor


def _settle(device: torch.device) -> None:
    """Wait for what was filled on the current stream.

    With graphs, Transformers copies a batch's inputs and computes it on streams of its own, which do not wait for the
    tensors to be filled. On a busy GPU first batches had other tokens, as they would have if they were computed before.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _switch(original: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    name = model.config._attn_implementation
    if name not in NAMES:
        return original(self, model, *args, **kwargs)
    _manager.records = _can_be_recorded(model)
    why = why_not_pages(model)
    if why is None:
        return None
    counters.fallbacks[f"continuous batching: {why}"] += 1
    logger.warning("continuous batching with attn_implementation=%r runs Transformers' own attention: %s", name, why)
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", True) else "eager")
    original(self, model, *args, **kwargs)
    # As the manager ends, the model gets its own back.
    self._original_attn_impl = name
    return None


def _can_be_recorded(model: Any) -> bool:
    """Whether CUDA graphs may be made unasked. On a CPU not, though there be a GPU in the machine."""
    config = model.config.get_text_config()
    has_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    # PyTorch's grouped product of experts in fp32 waits for the device.
    return model.device.type != "cpu" and not (has_experts and model.dtype == torch.float32)


def why_not_pages(model: Any) -> str | None:
    """Why our kernels cannot read the pages of a model's requests; None if they can."""
    config = model.config.get_text_config()
    if config.model_type in CHANGES_KEYS:
        return f"a model of type {config.model_type} changes keys between its cache and its attention"
    if any(map(_has_bias, model.modules())):
        # By then only new keys are there, in whose place the bias of all would have to be known.
        return "attention has a position_bias"
    heads = config.num_attention_heads
    groups, dim = getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        return f"{heads} query heads and {groups} key heads"
    dim = dim or config.hidden_size // heads
    device: torch.device = model.device
    backend, reason = choose_backend("auto", device, model.dtype, dim)
    return reason if backend == "reference" and device.type != "cpu" else None


def _has_bias(module: Any) -> bool:
    """Whether a module's forward speaks of a `position_bias`, as of what it hands to the attention function."""
    forward = inspect.unwrap(vars(module).get("forward") or type(module).forward)
    return _speaks_of_bias(getattr(forward, "__func__", forward))


@functools.lru_cache(maxsize=256)
def _speaks_of_bias(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    if code is None:
        return False
    # Names of keyword arguments stand together in tuples.
    tuples = [held for held in code.co_consts if isinstance(held, tuple)]
    return any(BIAS in names for names in (code.co_consts, code.co_varnames, *tuples))
