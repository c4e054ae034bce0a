"""`Side`: one of the two models that a program runs on, and the steps it can do; `Outcome`: what a step showed."""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)

import hf_fastattn
from tests.fuzz import adapters, edits
from tests.fuzz.prompts import prompt_batch
from tests.fuzz.users import Collect, Criterion, Processor, Thrown, halve_input, hook, own_loop, wrapped
from tests.tools.models import VOCAB, letters, noisy, tiny

PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# Not by the package, so that an older checkout of it can be tried.
CACHE = "cache" if "cache" in PARAMETERS else "past_key_values"


@dataclass
class Outcome:
    """What one step showed.

    Attributes:
        error: type and message of what was raised.
        result: of `generate()` or a forward.
        mask: `[B, columns]`, where tokens of the prompt are real.
        seen: what the user's code noted.
        cache: that the step used or gave back, if anybody has it.
        random: state of torch's generator afterwards.
        counters: of the last call, on the patched side.
    """

    error: tuple[str, str] | None = None
    result: Any = None
    mask: Tensor | None = None
    seen: list[Any] = field(default_factory=list)
    cache: Any = None
    random: Tensor | None = None
    counters: Any = None


class Side:
    """A tiny model, stock or patched, and what a chat with it has come to."""

    def __init__(self, program: dict[str, Any], patched: bool) -> None:
        self.program, self.patched = program, patched
        self.over = dict(program["over"])
        implementation = self.over.pop("attn_implementation", None)
        self.base = tiny(program["family"], **self.over).to(getattr(torch, program["dtype"]))
        _in_fp64(self.base)
        if implementation:
            self.base.set_attn_implementation(implementation)
        self.model: Any = self.base
        self.options = {"sampling": "transformers", **program["patch"], "cuda_graphs": bool(program.get("graphs"))}
        if patched:
            hf_fastattn.patch(self.base, **self.options)
        self.handles: list[Any] = []
        self.wrapped: list[tuple[Any, Any]] = []
        self.seen: list[Any] = []
        # Tokens, mask and cache of the last turn.
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self.cache: Any = None
        self.how_to_call: dict[str, Any] = {}

    def do(self, step: dict[str, Any]) -> Outcome:
        """Run one step; whatever it raises is part of the outcome."""
        outcome = Outcome()
        self.seen = outcome.seen
        # What another step left there is not this one's work.
        if self.is_patched and hasattr(self.base._fastattn.runtime, "counters"):
            self.base._fastattn.runtime.counters = type(self.base._fastattn.runtime.counters)()
        torch.manual_seed(step.get("seed", 0))
        try:
            getattr(self, step["do"])(step, outcome)
        except Exception as error:
            # Not the error itself: its frames hold caches.
            outcome.error = (type(error).__name__, str(error))
            if not isinstance(error, Thrown):
                # Transformers leaves a cache behind whose layers have different lengths.
                self.cache = None
        outcome.random = torch.get_rng_state()
        if self.is_patched:
            self._count(outcome)
        return outcome

    def _count(self, outcome: Outcome) -> None:
        try:
            outcome.counters = copy.deepcopy(hf_fastattn.report(self.base).last_call)
        except Exception as error:
            outcome.error = (f"report() raises {type(error).__name__}", str(error))

    @property
    def is_patched(self) -> bool:
        return "_fastattn" in vars(self.base)

    def generate(self, step: dict[str, Any], outcome: Outcome) -> None:
        options = dict(step["with"])
        batch, cache = self._inputs(step)
        outcome.mask = _shown(batch)
        virtual = getattr(getattr(self.model, "active_peft_config", None), "num_virtual_tokens", None)
        if outcome.mask is not None and virtual:
            # Prefix and prompt tuning put columns before the prompt's.
            outcome.mask = torch.nn.functional.pad(outcome.mask, (virtual, 0), value=1)
        if cache is not None:
            options[CACHE] = outcome.cache = cache
        options |= self._hung_in(step)
        if "stop_strings" in options:
            options["tokenizer"] = letters()
        if step.get("generation_config"):
            plain = {name: options.pop(name) for name in step["with"] if name in options}
            options["generation_config"] = GenerationConfig(pad_token_id=0, **plain)
        self.cache = cache
        with torch.inference_mode(step.get("mode") == "inference"):
            result = self.model.generate(**batch, **options, **self.how_to_call)
        self._drop_repeated_states(step, result, outcome.mask)
        outcome.result = result
        self._remember(result, batch, outcome, cache)

    @staticmethod
    def _drop_repeated_states(step: dict[str, Any], result: Any, mask: Tensor | None) -> None:
        """Behind the prompt's, assisted decoding gives the states of its first columns again, which padding has none of."""
        padded = mask is not None and not bool(mask.all())
        if "assistant" in step and padded and getattr(result, "hidden_states", None):
            result["hidden_states"] = result.hidden_states[:1]

    def _inputs(self, step: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        chat = step.get("chat")
        if chat is None or self.tokens is None or self.mask is None:
            batch = prompt_batch(step["prompt"], self.program["family"], self.base)
            return batch, self._new_cache(step.get("cache"))
        rows = self.tokens.shape[0]
        generator = torch.Generator().manual_seed(step.get("seed", 0))
        new = torch.randint(1, VOCAB - 8, (rows, chat["new"]), generator=generator)
        ids = torch.cat([self.tokens, new], 1)
        mask = torch.ones_like(ids)
        mask[:, : self.mask.shape[1]] = self.mask
        if chat["mask"] == "proper":
            answer = slice(self.mask.shape[1], self.tokens.shape[1])
            mask[:, answer] = (ids[:, answer] != 0).long()
        cache = None if chat["cache"] == "none" else self.cache
        return {"input_ids": ids, "attention_mask": mask}, copy.deepcopy(cache) if chat["cache"] == "copy" else cache

    def _new_cache(self, kind: str | None) -> Any:
        if kind == "static":
            return StaticCache(config=self.base.config, max_cache_len=80)
        if kind == "dynamic_plain":
            return DynamicCache()
        if kind == "paged" and self.patched:
            return hf_fastattn.PagedCache(self.base.config.get_text_config(decoder=True))
        return None if kind is None else DynamicCache(config=self.base.config)

    def _hung_in(self, step: dict[str, Any]) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if "streamer" in step:
            more["streamer"] = Collect(self.seen, 3 if step["streamer"] == "raise" else None)
        if "processor" in step:
            more["logits_processor"] = LogitsProcessorList([self._processor(step["processor"])])
        if "criterion" in step:
            more["stopping_criteria"] = StoppingCriteriaList([Criterion(step["criterion"], self.base, self.handles)])
        if step.get("custom"):
            more["custom_generate"] = own_loop
        if step.get("assistant") == "early_exit":
            more["assistant_early_exit"] = 1
        elif "assistant" in step:
            assistant = _in_fp64(noisy(tiny(self.program["family"], **self.over).to(self.base.dtype)))
            if step["assistant"] == "patched" and self.is_patched:
                hf_fastattn.patch(assistant, cuda_graphs=False)
            more["assistant_model"] = assistant
        return more

    def _processor(self, kind: str) -> Processor:
        return Processor(kind, self.seen, self.model, self.base, self.handles)

    def _remember(self, result: Any, batch: dict[str, Tensor], outcome: Outcome, cache: Any) -> None:
        sequences = result if isinstance(result, Tensor) else result.sequences
        given = batch.get("input_ids")
        self.cache = cache if isinstance(result, Tensor) else result.get(CACHE)
        outcome.cache = self.cache
        if given is None or sequences.shape[0] % given.shape[0]:
            self.tokens = self.mask = self.cache = None
            return
        mask = _shown(batch)
        assert mask is not None
        self.tokens = sequences
        self.mask = mask.repeat_interleave(sequences.shape[0] // given.shape[0], 0)
        if self.cache is None or (isinstance(result, Tensor) and not _fits(self.cache, sequences)):
            self.cache = None

    def forward(self, step: dict[str, Any], outcome: Outcome) -> None:
        """Over the chat's cache, or a new one that the next turn goes on with."""
        columns = step["columns"]
        if self.cache is None or self.tokens is None or self.mask is None:
            batch = prompt_batch({**step["prompt"], "embeds": False}, self.program["family"], self.base)
            cache: Any = hf_fastattn.PagedCache(self.base.config.get_text_config(decoder=True)) if self.is_patched else None
            cache = cache or DynamicCache(config=self.base.config)
            self.tokens = batch["input_ids"]
            self.mask = batch.get("attention_mask", torch.ones_like(self.tokens))
        else:
            cache, past = self.cache, self.cache.get_seq_length()
            ids = torch.full((self.tokens.shape[0], columns), 5)
            mask = torch.ones(self.tokens.shape[0], past + columns, dtype=torch.long)
            held = min(past, self.mask.shape[1])
            mask[:, :held] = self.mask[:, :held]
            batch = {"input_ids": ids, "attention_mask": mask}
            self.tokens = torch.cat([self.tokens[:, :past], ids], 1)
            self.mask = mask
        outcome.mask, self.cache = batch.get("attention_mask"), None
        outcome.cache = cache
        with torch.no_grad():
            outcome.result = self.model(**batch, **{CACHE: cache}, use_cache=True)
        self.cache = cache

    def edit(self, step: dict[str, Any], outcome: Outcome) -> None:
        edits.EDITS[step["kind"]](self.base, step)

    def repatch(self, step: dict[str, Any], outcome: Outcome) -> None:
        if not self.patched:
            return
        hf_fastattn.unpatch(self.model)
        if not step["unpatched"]:
            try:
                hf_fastattn.patch(self.model, **self.options)
            except ValueError as refused:
                # A model whose attention was wrapped meanwhile is refused, and goes on unpatched.
                if "undo that before patch()" not in str(refused):
                    raise

    def copy(self, step: dict[str, Any], outcome: Outcome) -> None:
        """Go on with a copy, patched anew, without the chat, whose pages are the other model's."""
        if self.model is not self.base or self.handles or self.wrapped:
            return
        if step["kind"] == "saved":
            with tempfile.TemporaryDirectory() as folder:
                self.base.save_pretrained(folder)
                made = _in_fp64(type(self.base).from_pretrained(folder, dtype=self.base.dtype)).train(self.base.training)
            made.set_attn_implementation(self.base.config._attn_implementation)
        else:
            made = copy.deepcopy(self.base) if step["kind"] == "deepcopy" else pickle.loads(pickle.dumps(self.base))
        if self.is_patched:
            hf_fastattn.patch(made, **self.options)
        self.base = self.model = made
        self.tokens = self.mask = self.cache = None

    def train(self, step: dict[str, Any], outcome: Outcome) -> None:
        self.model.train(step["on"])

    def hook(self, step: dict[str, Any], outcome: Outcome) -> None:
        module = edits.place(self.base, step["at"], step["layer"])
        if step["kind"] == "halve_input":
            self.handles.append(module.register_forward_pre_hook(halve_input, with_kwargs=True))
        else:
            self.handles.append(module.register_forward_hook(hook(step["kind"], step["after"], Notes(self))))

    def unhook(self, step: dict[str, Any], outcome: Outcome) -> None:
        for handle in self.handles:
            handle.remove()
        for module, before in reversed(self.wrapped):
            if before is None:
                del module.forward
            else:
                module.forward = before
        self.handles, self.wrapped = [], []

    def wrap(self, step: dict[str, Any], outcome: Outcome) -> None:
        module = edits.place(self.base, step["at"], step["layer"])
        self.wrapped.append((module, vars(module).get("forward")))
        module.forward = wrapped(module.forward, step["scale"], Notes(self))

    def adapter(self, step: dict[str, Any], outcome: Outcome) -> None:
        if self.model is not self.base:
            return
        kind = step["kind"]
        self.model, self.cache = adapters.wrap(self.base, kind), None
        if kind == "lora_disabled":
            self.model.base_model.disable_adapter_layers()

    def threads(self, step: dict[str, Any], outcome: Outcome) -> None:
        """Two at once. Not by a wrapper: PEFT exchanges methods of the model for the length of a call."""
        batch = prompt_batch({**step["prompt"], "embeds": False}, self.program["family"], self.base)
        results: list[Any] = [None, None]

        def run(place: int) -> None:
            try:
                results[place] = self.base.generate(**batch, max_new_tokens=step["new"], do_sample=False, pad_token_id=0)
            except Exception as error:
                results[place] = type(error).__name__

        both = [threading.Thread(target=run, args=(place,)) for place in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        # In which order two threads ran is nobody's to say.
        self.seen.sort(key=str)
        outcome.result = results

    def edit_cache(self, step: dict[str, Any], outcome: Outcome) -> None:
        if self.cache is None or self.tokens is None or self.mask is None:
            return
        rows, columns = self.tokens.shape[0], self.cache.get_seq_length()
        kind, amount = step["edit"], step["amount"]
        outcome.cache = self.cache
        if kind == "crop":
            self.cache.crop(-min(amount, columns - 1))
            columns = self.cache.get_seq_length()
            self.tokens, self.mask = self.tokens[:, :columns], self.mask[:, :columns]
        elif kind == "deepcopy":
            self.cache = copy.deepcopy(self.cache)
        elif kind == "reset":
            self.cache = None
        else:
            order = torch.tensor([(amount + row) % rows for row in range(rows)])
            if kind == "reorder":
                self.cache.reorder_cache(order)
            elif kind == "select":
                order = order[: max(rows - 1, 1)]
                self.cache.batch_select_indices(order)
            else:
                order = torch.arange(rows).repeat_interleave(2)
                self.cache.batch_repeat_interleave(2)
            self.tokens, self.mask = self.tokens[order], self.mask[order]
        outcome.cache, outcome.mask = self.cache, self.mask


class Notes:
    """What `append` is given goes where the side notes things now."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def append(self, note: Any) -> None:
        self.side.seen.append(note)


def _in_fp64(model: Any) -> Any:
    """The model, whose experts can be computed in its dtype: no other implementation of them has fp64."""
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _shown(batch: dict[str, Tensor]) -> Tensor | None:
    """The mask of a batch; without one `generate()` takes the padding token for padding."""
    ids = batch.get("input_ids")
    inferred = None if ids is None or not bool((ids == 0).any()) else (ids != 0).long()
    mask = inferred if inferred is not None else None if ids is None else torch.ones_like(ids)
    return batch.get("attention_mask", mask)


def _fits(cache: Any, sequences: Tensor) -> bool:
    return bool(cache.get_seq_length() <= sequences.shape[1])
