"""The hooks in `generate()`: a paged cache for every call, and each distinct prompt computed once."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from hf_fastattn.cache import PagedCache
from hf_fastattn.fast_sample import fast_sample
from hf_fastattn.prompt_rows import distinct_rows, expansion_of, unshared
from hf_fastattn.runtime import Runtime
from hf_fastattn.transformers_version import CACHE


class FastGenerationMixin:
    """Goes in front of a model's class; see `fast_class`."""

    _fastattn: Any
    _fastattn_base: Any

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        supplied = model_kwargs.get(CACHE)
        done = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        runtime: Runtime = self._fastattn.runtime
        if runtime.current is None:
            return done
        cache = model_kwargs.get(CACHE)
        reason = _why_stock_cache(supplied, cache, generation_config, model_kwargs)
        if reason is not None:
            if reason:
                runtime.count_fallback(reason)
            return done
        config = self.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
        paged = runtime.new_cache(config, self.dtype, max_cache_length + 1)  # type: ignore[attr-defined]
        if generation_config.is_assistant:
            paged.activate_past_recording()
        model_kwargs[CACHE] = paged
        return done

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        runtime: Runtime = self._fastattn.runtime
        before = {} if runtime.is_aside else {name: unshared(value) for name, value in model_kwargs.items()}
        ids, expanded = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        runtime.expansion = expansion_of(expand_size, before, expanded)
        return ids, expanded

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, is_first_iteration: bool = True
    ) -> Any:
        runtime: Runtime = self._fastattn.runtime
        if runtime.is_aside:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]
        prefilled = runtime.take_prefilled()
        if prefilled is not None:
            return prefilled
        cache = model_kwargs.get(CACHE)
        rows = None
        if isinstance(cache, PagedCache) and cache.get_seq_length() == 0:
            rows = distinct_rows(input_ids, model_kwargs, runtime.expansion)
        with runtime.prefill():
            if rows is None:
                return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]
            outputs = super()._prefill(  # type: ignore[misc]
                input_ids[rows.first], generation_config, rows.select(model_kwargs), is_first_iteration
            )
        assert isinstance(cache, PagedCache)
        cache.select_rows(rows.copies)
        return rows.expand(outputs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The device's own loop if the call allows it; else Transformers', over replayed forwards."""
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not synced_gpus and self._fastattn.runtime.current is not None:
            result = fast_sample(self, *given, streamer, model_kwargs)
            if result is not None:
                return result
        return super()._sample(*given, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        before = model_kwargs.get("attention_mask")
        updated = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        cache = updated.get(CACHE)
        if isinstance(cache, PagedCache):
            cache.seen_mask.extend(before, updated.get("attention_mask"))
        return updated

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
        return runtime.call(self.training, functools.partial(base.generate, self, *args, **kwargs))  # type: ignore[attr-defined]

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (FastGenerationMixin, base), {**names, "generate": generate, "_fastattn_base": base})


def _why_stock_cache(supplied: Any, cache: Any, generation_config: Any, model_kwargs: dict) -> str | None:
    """Why the call keeps Transformers' cache: a reason to report, "" for the user's wish, None if pages will do."""
    if supplied is not None:
        return "" if isinstance(supplied, PagedCache) else f"{CACHE} is a {type(supplied).__name__}"
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"cache_implementation={generation_config.cache_implementation!r}, use_cache={generation_config.use_cache}"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.any(1).all()):
        return "a row of the prompt has no visible token"
    return None


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
