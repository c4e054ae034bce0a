"""The hooks in `generate()`: a paged cache for every call, and each distinct prompt computed once."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from hf_fastattn.cache import PagedCache
from hf_fastattn.runtime import Runtime

# Inputs that belong to the rows of a text prompt; any other one keeps the rows apart.
_ROW_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
_SHARED_INPUTS = ("past_key_values", "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")


class FastGenerationMixin:
    """Goes in front of a model's class; see `fast_class`."""

    _fastattn: Any
    _fastattn_base: Any

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        supplied = model_kwargs.get("past_key_values")
        done = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        runtime: Runtime = self._fastattn.runtime
        cache = model_kwargs.get("past_key_values")
        reason = _why_stock_cache(supplied, cache, generation_config, model_kwargs)
        if reason is not None:
            if reason:
                runtime.count_fallback(reason)
            return done
        config = self.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
        paged = runtime.new_cache(config, self.dtype, max_cache_length + 1)  # type: ignore[attr-defined]
        if generation_config.is_assistant:
            paged.activate_past_recording()
        model_kwargs["past_key_values"] = paged
        return done

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, is_first_iteration: bool = True
    ) -> Any:
        runtime: Runtime = self._fastattn.runtime
        cache = model_kwargs.get("past_key_values")
        rows = None
        if isinstance(cache, PagedCache) and cache.get_seq_length() == 0:
            rows = distinct_rows(input_ids, model_kwargs)
        with runtime.prefill():
            if rows is None:
                return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]
            first, copies = rows
            kwargs = {name: _select(value, first, name) for name, value in model_kwargs.items()}
            outputs = super()._prefill(  # type: ignore[misc]
                input_ids[first], generation_config, kwargs, is_first_iteration
            )
        assert isinstance(cache, PagedCache)
        cache.select_rows(copies)
        return _expand_outputs(outputs, torch.tensor(copies))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A plain, unpatched copy."""
        with self._fastattn.scope.suspended():
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the plain, unpatched model."""
        # From protocol 2 on pickle insists that the object's class be the pickled one; 1 names the class freely.
        return _unpatched_twin(self).__reduce_ex__(1)


@functools.cache
def fast_class(base: Any) -> type:
    """A subclass of a model class with our hooks, by the same name: Transformers looks classes up by it.

    Its `generate()` takes and returns what the model's does; pages are released when it returns or fails.
    """

    @functools.wraps(base.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime: Runtime = self._fastattn.runtime
        with runtime.call(self.training) as set_result:
            result = base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
            set_result(result)
            return result

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (FastGenerationMixin, base), {**names, "generate": generate, "_fastattn_base": base})


def _why_stock_cache(supplied: Any, cache: Any, generation_config: Any, model_kwargs: dict) -> str | None:
    """Why the call keeps Transformers' cache: a reason to report, "" for the user's wish, None if pages will do."""
    if supplied is not None:
        return "" if isinstance(supplied, PagedCache) else f"past_key_values is a {type(supplied).__name__}"
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"cache_implementation={generation_config.cache_implementation!r}, use_cache={generation_config.use_cache}"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.any(1).all()):
        return "a row of the prompt has no visible token"
    return None


def distinct_rows(input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """The rows of a prompt batch that differ.

    Returns:
        The first row of each kind, and for every row which of them it equals; None if all differ, or if inputs are
        given that this code does not know how to take apart.
    """
    count = input_ids.shape[0]
    tensors = [input_ids]
    for name, value in model_kwargs.items():
        if value is None or name in _SHARED_INPUTS or isinstance(value, bool | int | str):
            continue
        if name not in _ROW_INPUTS or not isinstance(value, Tensor) or value.shape[0] not in (1, count):
            return None
        if value.shape[0] == count:
            tensors.append(value)
    first: list[int] = []
    copies: list[int] = []
    kinds: dict[tuple[bytes, ...], int] = {}
    host = [tensor.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy() for tensor in tensors if tensor.numel()]
    for row in range(count):
        key = tuple(rows[row].tobytes() for rows in host)
        if key not in kinds:
            kinds[key] = len(first)
            first.append(row)
        copies.append(kinds[key])
    return (first, copies) if len(first) < count else None


def _select(value: Any, rows: list[int], name: str) -> Any:
    if name in _ROW_INPUTS and isinstance(value, Tensor) and value.shape[0] > 1:
        return value[rows]
    return value


def _expand_outputs(outputs: ModelOutput, rows: Tensor) -> ModelOutput:
    """The outputs of the distinct rows, for all rows."""

    def expand(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, rows.to(value.device))
        if isinstance(value, tuple):
            return tuple(expand(item) for item in value)
        return value

    for name, value in list(outputs.items()):
        outputs[name] = expand(value)
    return outputs


def _unpatched_twin(model: Any) -> Any:
    """The model's modules without our attributes, sharing every parameter with it."""
    scope = model._fastattn.scope
    twins: dict[int, Any] = {}
    for module in model.modules():
        cls: Any = model._fastattn_base if module is model else type(module)
        twins[id(module)] = cls.__new__(cls)
    for module in model.modules():
        state = scope.original_vars(module)
        state["_modules"] = {name: child and twins[id(child)] for name, child in state["_modules"].items()}
        vars(twins[id(module)]).update(state)
    return twins[id(model)]
