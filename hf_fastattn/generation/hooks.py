"""The hooks in `generate()`: a paged cache for every call, and each distinct prompt computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.call import Call
from hf_fastattn.expansion import expansion_of, unshared
from hf_fastattn.generation.agreed_call import agreed_path
from hf_fastattn.generation.columns_at_once import columns_at_once, may_end_early
from hf_fastattn.generation.device_beams import device_beams
from hf_fastattn.generation.device_sample import GoesOn, device_sample
from hf_fastattn.generation.drafts import Stateful, check_drafts
from hf_fastattn.generation.prefix_call import compute_prompt, keep_generated, look_ahead
from hf_fastattn.generation.prompt_rows import PromptRows, distinct_rows
from hf_fastattn.generation.stock_cache import why_not_here, why_not_prompt, why_stock_cache
from hf_fastattn.generation.users_code import exchanged_methods, runs_between_forwards
from hf_fastattn.graphs.module_checks import has_compiled, is_compiled_itself
from hf_fastattn.graphs.seen_modules import Seen
from hf_fastattn.layer_variants import READS_ROW
from hf_fastattn.patches.modules.plain_copies import PlainCopies
from hf_fastattn.patches.modules.unchanged import why_not_ours
from hf_fastattn.patches.modules.watched import why_rows_differ
from hf_fastattn.runtime import Runtime
from hf_fastattn.streaming import why_not_call
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.uncompiled import uncompiled
from hf_fastattn.wrappers import PREPARING, prepared_by

# Calls that ask for the device's loop when it is their turn; of all others the report says so.
LOOPED = (
    GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE,
)  # fmt: skip


class FastGenerationMixin(PlainCopies):
    """Goes in front of a model's class; see `model_class.fast_class`."""

    _fastattn: Any
    _is_stateful = Stateful()

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
        if generation_mode not in LOOPED:
            # A prompt that another loop computes is not told from what comes after it.
            runtime.current.seen = None
            runtime.count_not_looped(f"the call asks for {generation_mode.value.replace('_', ' ')}")
        cache = model_kwargs.get(CACHE)
        if runtime.config.streaming is not None:
            asked = "assisted generation" if generation_config.is_assistant else generation_mode.value
            refused = why_not_call(asked)
            if refused is not None:
                raise ValueError(refused)
        first = columns_at_once(generation_config, model_kwargs, max_cache_length + 1)
        # An assistant's cache serves many calls of a few tokens.
        room = 0 if generation_config.is_assistant else max_cache_length + 1
        if isinstance(supplied, PagedCache):
            supplied.room, supplied.first = room, first
            if supplied.may_adopt:
                supplied.adopt(runtime.groups_for(self), self.config)  # type: ignore[attr-defined]
            runtime.current.why_dense = why_not_prompt(model_kwargs)
        config = self.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
        reason = why_stock_cache(supplied, cache, config, generation_config, model_kwargs)
        if reason is None:
            reason = why_not_here(self) or why_not_ours(self._fastattn.decoder(self))
        if supplied is not None and not isinstance(supplied, PagedCache) and runtime.variants.rotates:
            reason = f"{CACHE} is a {type(supplied).__name__}, and RoPE is inside attention: give a PagedCache"
        if runtime.ranks is not None:
            reason = agreed_path(self, reason, generation_config, generation_mode, model_kwargs)
        if reason is not None:
            if reason:
                runtime.count_fallback(reason)
            check_drafts(self, generation_mode, generation_config, cache)
            return done
        # Transformers has made one of this model just now.
        made = cache if supplied is None and type(cache) is DynamicCache else None
        paged = runtime.new_cache(self, room, first, supplied, None if made is None else made.layers or None)
        if generation_config.is_assistant and supplied is None:
            paged.is_for_drafts = True
            paged.activate_past_recording()
        model_kwargs[CACHE] = paged
        check_drafts(self, generation_mode, generation_config, paged)
        return done

    def _extract_generation_mode_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._extract_generation_mode_kwargs(*args, **kwargs)  # type: ignore[misc]
        call = self._fastattn.runtime.current
        if call is not None:
            call.synced = bool(made.get("synced_gpus"))
        return made

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        runtime: Runtime = self._fastattn.runtime
        before = {} if runtime.is_aside else {name: unshared(value) for name, value in model_kwargs.items()}
        ids, expanded = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        runtime.expansion = expansion_of(expand_size, before, expanded)
        call = runtime.current
        if call is not None:
            call.prompt_columns = 0 if ids is None else ids.shape[1]
        if runtime.ranks is not None and call is not None:
            call.input_ids = ids
        return ids, expanded

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        before = dict(model_kwargs)
        prepared = super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs, *args, **kwargs
        )
        # What a tower has made of equal images need not be equal to the last bit: the images are compared.
        self._fastattn.runtime.keep_encoded_from({name: value for name, value in before.items() if name not in prepared})
        return prepared

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
            rows = self._distinct_rows(input_ids, model_kwargs)
        prefill = super()._prefill  # type: ignore[misc]

        def compute(ids: Tensor, inputs: dict[str, Any]) -> Any:
            return prefill(ids, generation_config, inputs, is_first_iteration)

        with runtime.prefill(None if rows is None else rows.copies):
            if not isinstance(cache, PagedCache) or cache.get_seq_length():
                return compute(input_ids, model_kwargs)
            if rows is None:
                return compute_prompt(self, cache, input_ids, model_kwargs, generation_config, None, compute)
            inputs = rows.select(model_kwargs)
            outputs = compute_prompt(self, cache, input_ids[rows.first], inputs, generation_config, rows.copies, compute)
        held = runtime.paged_of(outputs[CACHE])
        shares, known = held.shares_pages, held.known_mask
        # Nothing from here on waits for the device, which computes the prompt.
        held.select_rows(rows.copies)
        known.select(inputs.get("attention_mask"), model_kwargs.get("attention_mask"))
        held.known_mask = known
        if shares:
            held.regroup()
        return rows.expand(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward, uncompiled if it is over pages."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not self._runs_uncompiled(kwargs.get(CACHE)):
            return self._fast_forward(*args, **kwargs)
        with uncompiled():
            return self._fast_forward(*args, **kwargs)

    def _runs_uncompiled(self, cache: Any) -> bool:
        call, model = self._fastattn.runtime.current, cast(nn.Module, self)
        if call is None:
            # Layers are not looked at in every forward of somebody's own loop.
            return isinstance(cache, PagedCache) and is_compiled_itself(model)
        if call.compiled is None:
            call.compiled = bool(call.caches or isinstance(cache, PagedCache)) and self._has_compiled(call.seen)
        return call.compiled

    def _has_compiled(self, seen: Seen | None) -> bool:
        model = cast(nn.Module, self)
        return has_compiled(model) if seen is None else seen.answer("compiled", lambda: has_compiled(model))

    def _fast_forward(self, *args: Any, **kwargs: Any) -> Any:
        """A forward; the first one of a loop that is not Transformers' computes each distinct prompt once as well."""
        runtime: Runtime = self._fastattn.runtime
        cache, input_ids, call = kwargs.get(CACHE), kwargs.get("input_ids"), runtime.current
        if call is not None:
            call.logits_read = self._logits_read(call, runtime.paged_of(cache), kwargs)
        own = not args and input_ids is not None and not runtime.prefilling
        if not isinstance(cache, PagedCache) or not own or not runtime.is_private(cache) or cache.get_seq_length():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(input_ids, Tensor)
        others = {name: value for name, value in kwargs.items() if name != "input_ids"}
        rows = self._distinct_rows(input_ids, others)
        if rows is None:
            return super().__call__(**kwargs)  # type: ignore[misc]
        with runtime.prefill():
            outputs = super().__call__(input_ids=input_ids[rows.first], **rows.select(others))  # type: ignore[misc]
        cache.select_rows(rows.copies)
        return rows.expand(outputs)

    def _logits_read(self, call: Call, cache: Any, inputs: dict[str, Any]) -> int:
        """Of how many last columns of a forward Transformers reads the logits."""
        kept, new = inputs.get("logits_to_keep"), inputs.get("input_ids")
        if isinstance(kept, int) and kept > 0:
            return kept
        new = inputs.get("inputs_embeds") if new is None else new
        if new is None or not isinstance(cache, PagedCache):
            return 1
        # All logits are made: of a prompt with drafts behind it, its last column's and those of the drafts are read.
        return max(cache.get_seq_length() + new.shape[1] - call.prompt_columns, 0) + 1

    def _distinct_rows(self, input_ids: Tensor, inputs: dict[str, Any]) -> PromptRows | None:
        runtime = self._fastattn.runtime
        call = runtime.current
        if not runtime.shares_rows or (call is not None and call.why_apart is not None):
            return None
        config = self.config  # type: ignore[attr-defined]
        rows = distinct_rows(input_ids, inputs, runtime.expansion, config, runtime.take_encoded_from())
        if isinstance(rows, str):
            runtime.note(f"equal rows of the prompt are not looked for: {rows}")
            return None
        why_differ = None if rows is None else self._why_rows_differ()
        if why_differ is not None:
            runtime.count_unshared(f"equal rows are computed one by one: {why_differ}")
            return None
        return rows

    def _why_rows_differ(self) -> str | None:
        """Why equal rows may have different hidden states."""
        if self._fastattn.runtime.variants.reads_row:
            return READS_ROW
        origin = prepared_by(self)
        if not origin.startswith(("transformers.", "peft.")) and vars(self).keys() & set(PREPARING):
            return f"the model's inputs are prepared by {origin}"
        call = self._fastattn.runtime.current
        return why_rows_differ(self, None if call is None else call.seen)  # type: ignore[arg-type]

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
        given, loop = (input_ids, logits_processor, stopping_criteria, generation_config), super()._sample  # type: ignore[misc]
        held = (logits_processor, *logits_processor, stopping_criteria, *stopping_criteria)
        ran = (*held, *(() if streamer is None else (streamer,)), loop)
        with self._left_alone(ran):
            if self._may_loop(ran, stopping_criteria, synced_gpus, model_kwargs):
                result = device_sample(self, *given, streamer, model_kwargs)
                if isinstance(result, GoesOn):
                    given, model_kwargs = (result.input_ids, *given[1:]), result.model_kwargs
                elif result is not None:
                    return result
            result = loop(*given, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
            keep_generated(self, model_kwargs.get(CACHE), input_ids.shape[1], result, ran)
            return result

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The same for beams."""
        given, search = (input_ids, logits_processor, stopping_criteria, generation_config), super()._beam_search  # type: ignore[misc]
        ran = (logits_processor, *logits_processor, stopping_criteria, *stopping_criteria, search)
        with self._left_alone(ran):
            if self._may_loop(ran, stopping_criteria, synced_gpus, model_kwargs):
                result = device_beams(self, *given, model_kwargs)
                if result is not None:
                    return result
            return search(*given, synced_gpus=synced_gpus, **model_kwargs)

    @contextmanager
    def _left_alone(self, ran: Iterable[Any]) -> Iterator[None]:
        """A loop in which no code of the user's may run between two forwards, if that is so; afterwards it may again."""
        runtime: Runtime = self._fastattn.runtime
        if runtime.current is None or runs_between_forwards(self, ran):
            yield
            return
        with runtime.left_to_stocks_code():
            yield

    def _may_loop(self, ran: Iterable[Any], stopping_criteria: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
        """Whether to ask for the device's loop; rows that cannot end early get their pages at once, whichever loop runs."""
        cache, runtime = model_kwargs.get(CACHE), self._fastattn.runtime
        if runtime.current is None:
            return False
        look_ahead(self, cache)
        ends = runtime.row_limits is not None or may_end_early(stopping_criteria)
        if isinstance(cache, PagedCache) and not ends:
            cache.first = max(cache.first, cache.room)
        # Where no code of the user's runs between forwards, nothing was exchanged.
        asked = ran if runtime.current.users_code else ()
        exchanged = next(chain.from_iterable(map(exchanged_methods, asked)), None)
        if synced_gpus:
            runtime.count_not_looped("synced_gpus: several processes take their steps together")
        elif exchanged is not None:
            runtime.count_not_looped(f"{exchanged} was exchanged")
        return not synced_gpus and exchanged is None

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        before = model_kwargs.get("attention_mask")
        updated = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        cache = self._fastattn.runtime.paged_of(updated.get(CACHE))
        if isinstance(cache, PagedCache):
            updated[CACHE] = cache
            cache.known_mask.extend(before, updated.get("attention_mask"))
        return updated
