"""`report`: what a patch replaced, which backend runs, and what the last call did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counters import CallCounters
from hf_fastattn.generation.hooks import FastGenerationMixin
from hf_fastattn.hints import with_hint
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.pages.model_layout import key_shape
from hf_fastattn.patching import find_model


@dataclass(frozen=True)
class Report:
    """What `hf_fastattn` does for a model.

    Attributes:
        patched: whether the model is patched; all else is empty if not.
        family: its model type.
        backend: the kernels in use, and `backend_reason` why these.
        config: the options.
        modules: names of the modules whose forward was replaced.
        last_call: counters of the last `generate()`, and of forwards since.
        pages_in_use: pages held by caches now.
        pages_kept: of these, those that `prefix_cache` holds for prompts to come.
        page_bytes_allocated: bytes of page storage now.
        variants: a line for each run of layers with an attention variant.
        kv_dtype: in which numbers keys and values are stored: `"fp8"`, `"int8"`, or None, the model's own; with both, by
            `kv_wide_window`, the narrower.
        page_bytes_saved: bytes that the page storage would take besides without `kv_dtype`.
    """

    patched: bool
    family: str | None = None
    backend: str | None = None
    backend_reason: str | None = None
    config: FastAttnConfig | None = None
    modules: tuple[str, ...] = ()
    last_call: CallCounters | None = None
    pages_in_use: int = 0
    pages_kept: int = 0
    page_bytes_allocated: int = 0
    variants: tuple[str, ...] = ()
    kv_dtype: str | None = None
    page_bytes_saved: int = 0

    def __str__(self) -> str:
        if not self.patched or self.last_call is None:
            return "not patched"
        call = self.last_call
        falls = ", ".join(f"{with_hint(reason)} ({count})" for reason, count in call.fallbacks.items()) or "none"
        others = "".join(
            f"; Transformers', since {with_hint(reason)} ({count})" for reason, count in call.not_looped.items()
        )
        loops = f"the device's ({call.fast_loops}){others}" if call.fast_loops else others.removeprefix("; ") or "none"
        layered = "".join(f"; layer by layer: {with_hint(reason)} ({count})" for reason, count in call.uncaptured.items())
        unused = "".join(f"; not looked for: {with_hint(reason)} ({count})" for reason, count in call.prefix_unused.items())
        return "\n".join(
            (
                f"family        {self.family}, {len(self.modules)} modules replaced",
                f"backend       {self.backend} ({self.backend_reason})",
                f"options       {self.config}",
                *(f"variant       {line}" for line in self.variants),
                f"last call     {call.forwards} paged forwards, {call.prompt_tokens} prompt tokens computed, "
                f"{call.tokens_reused} found in pages{unused}",
                f"pages         {call.pages_allocated} allocated, {call.pages_shared} shared, {call.pages_copied} copied",
                f"graphs        {call.graphs_captured} captured, {call.graphs_replayed} replayed{layered}",
                f"appends       {call.appends_captured} captured, {call.appends_replayed} replayed",
                f"loop          {loops}",
                *_batches(call),
                f"fallbacks     {falls}",
                *self._format_lines(),
                f"now           {self.pages_in_use} pages in use, {self.pages_kept} of them kept for prompts to come, "
                f"{self.page_bytes_allocated / 2**20:.1f} MiB allocated",
            )
        )

    def _format_lines(self) -> list[str]:
        """The line about 8-bit keys and values, if there are any."""
        if self.kv_dtype is None:
            return []
        saved = f"{self.page_bytes_saved / 2**20:.1f} MiB less than in the model's dtype"
        return [f"keys, values  {self.kv_dtype} with a scale for each token and head: {saved}"]


def _batches(call: CallCounters) -> list[str]:
    """The line about running batches, if there was one."""
    if not call.requests_batched:
        return []
    again = f", {call.requests_preempted} times one made way for others" if call.requests_preempted else ""
    return [f"batch         {call.requests_batched} requests in {call.batch_steps} steps{again}"]


def report(model: Any) -> Report:
    """What is replaced in `model`, why, and what its last call did.

    Raises:
        TypeError: not a Transformers model.
        ValueError: the backend that was asked for cannot run where the model is.
    """
    target = find_model(model)
    if not isinstance(target, FastGenerationMixin):
        return Report(patched=False)
    state: Any = target._fastattn
    inner: Any = target
    runtime = state.runtime
    runtime.settle()
    heads = (inner.device, inner.dtype, key_shape(inner.config)[1])
    backend, reason = choose_backend(runtime.config.backend, *heads, runtime.config.batch_invariant)
    return Report(
        patched=True,
        family=state.family.model_type,
        backend=backend,
        backend_reason=reason,
        config=runtime.config,
        modules=state.modules,
        last_call=runtime.counters,
        pages_in_use=runtime.groups.pages_in_use,
        pages_kept=0 if runtime.prefixes is None else len(runtime.prefixes.index),
        page_bytes_allocated=runtime.groups.nbytes,
        variants=tuple(runtime.variants.describe()),
        kv_dtype=next(iter(runtime.groups.formats), None),
        page_bytes_saved=runtime.groups.bytes_saved,
    )
