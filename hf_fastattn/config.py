"""The options of `hf_fastattn.patch`, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hf_fastattn.stream_layout import Streaming

BACKENDS = ("auto", "reference", "triton", "hopper")
SAMPLING_MODES = ("fast", "transformers")
WEIGHTS = ("check", "frozen")
# As `kernels.page_formats.KV_DTYPES`, which needs PyTorch.
KV_DTYPES = ("fp8", "int8")


@dataclass(frozen=True)
class FastAttnConfig:
    """How a patched model stores its K/V pages and computes attention.

    Args:
        page_size: tokens a page holds; a power of two from 1 to 1024.
        memory_limit: most bytes that the pages of one model may take, over all layers; `None` sets no limit.
        keep_memory: share (0 to 1) of the page storage kept allocated between `generate()` calls when no cache
            holds a page; in train mode see `keep_in_training`.
        backend: `"reference"` (PyTorch, any device), `"triton"` (CUDA devices), `"hopper"` (these, and Gluon kernels for
            long prompts on H100 and H200), or `"auto"`, the last of them that can run.
        batch_invariant: attention of a row is bitwise the same whatever rows are computed with it (He et al., 2025,
            "Defeating Nondeterminism in LLM Inference"), and dense layers and `lm_head` are Transformers' own modules, in
            recorded steps too, so that a step's products are those that a forward computes. Triton backends only; a step
            takes a third longer than with our fused layers. Mixtures of experts, hybrids with linear attention and models on
            several devices keep fused layers.
        cuda_graphs: on a CUDA device, decode steps are recorded once as CUDA graphs and replayed.
        keep_in_training: a model in train mode keeps what takes at most 128 MiB in all, and nothing of more, so that a
            training step finds its memory free; with this option as much as in eval mode: the pages of a rollout, its
            recorded steps and, under autocast, 16-bit copies of fp32 weights stay allocated while the training step runs,
            and the next rollout need not make them again.
        autocast_copies: under autocast, decode steps of a model with fp32 weights read 16-bit copies of them, cast anew
            before each call, which take half of the weights' bytes; `False`, or where they do not fit: the weights are
            rounded as they are read, which takes no memory, and up to twice the time for few rows.
        sampling: how tokens are drawn where steps are replayed: `"fast"`, inside the step, by random numbers that depend on
            a seed from torch's generator, the row and the step alone; or `"transformers"`, by its own code, with its draws.
        prefix_cache: pages of prompts and of what was generated stay after a call, and a later prompt that begins with the
            same tokens computes only what is new. They go, the least recently used first, where `memory_limit` (without
            one a quarter of the device's memory) leaves no room; not in train mode, and not for layers with a window.
        weights: how `prefix_cache` knows that pages are those of the model as it is now: `"check"`, by a sum over the bits
            of the weights that keys depend on, which are read once before each prompt; or `"frozen"`: you promise that
            nothing writes to weights in place (an optimiser, `.data`, `load_state_dict`, merging an adapter) while the model
            is patched; that weights are replaced by others is seen.
        streaming: rows keep their first and their last tokens only, so that they can be generated without end in constant
            memory and time a token; see `Streaming`. Attention then differs from Transformers' for rows that are longer.
        kv_dtype: in which numbers keys and values are stored: `None`, those of the model; `"fp8"`, e4m3 (GPUs from
            capability 8.9 on, and CPUs); or `"int8"`. In 8 bits each token and head has a scale; it is rounded once, when
            it is written, and multiplied out inside attention. That takes a little more than half of the memory of 16-bit
            keys and values, and of what a step reads; outputs differ by the rounding.
        kv_wide_window: layers with a window of at most so many tokens keep keys and values as the model gives them, whatever
            `kv_dtype` says: they read and store little, and gain nothing.
        mixed_steps: in running batches (`generate_batch`), decode steps that are recorded compute pieces of the prompts of
            other requests in the same forward; and of requests that come together, to a manager with `workload_hints`,
            those that may get most tokens begin. It holds for up to 64 rows: beside more, a piece costs as much as by
            itself. False: pieces are forwards by themselves, between steps.

    Raises:
        TypeError: an option has the wrong type, or is unknown.
        ValueError: an option is out of its range.
    """

    page_size: int = 16
    memory_limit: int | None = None
    keep_memory: float = 1.0
    backend: str = "auto"
    batch_invariant: bool = False
    cuda_graphs: bool = True
    sampling: str = "fast"
    keep_in_training: bool = False
    autocast_copies: bool = True
    prefix_cache: bool = False
    weights: str = "check"
    streaming: Streaming | None = None
    kv_dtype: str | None = None
    kv_wide_window: int = 1024
    mixed_steps: bool = True

    def __post_init__(self) -> None:
        size = self.page_size
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"page_size must be an int, got {size!r}; use a power of two such as 16")
        if size < 1 or size > 1024 or size & (size - 1):
            raise ValueError(f"page_size={size} is not a power of two from 1 to 1024; use for example 16")
        limit = self.memory_limit
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
            raise TypeError(f"memory_limit must be a number of bytes (int) or None, got {limit!r}")
        if limit is not None and limit <= 0:
            raise ValueError(f"memory_limit={limit} must be a positive number of bytes, or None for no limit")
        if not isinstance(self.keep_memory, int | float) or not 0 <= self.keep_memory <= 1:
            raise ValueError(f"keep_memory={self.keep_memory!r} must be a share between 0 and 1")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is unknown; choose one of {BACKENDS}")
        for name in ("batch_invariant", "cuda_graphs", "keep_in_training", "autocast_copies", "prefix_cache", "mixed_steps"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.batch_invariant and self.backend == "reference":
            raise ValueError("batch_invariant=True needs the Triton kernels; use backend='auto' or 'triton'")
        if self.sampling not in SAMPLING_MODES:
            raise ValueError(f"sampling={self.sampling!r} is unknown; choose one of {SAMPLING_MODES}")
        if self.streaming is not None and not isinstance(self.streaming, Streaming):
            raise TypeError(f"streaming must be a hf_fastattn.Streaming or None, got {self.streaming!r}")
        if self.streaming is not None and self.prefix_cache:
            raise ValueError(
                "streaming and prefix_cache=True: pages of a row that forgets tokens hold no prefix; use one of them"
            )
        if self.streaming is not None and self.kv_dtype is not None:
            raise ValueError(
                f"streaming and kv_dtype={self.kv_dtype!r}: the kernels that rotate keys as they read them read no 8 bits; "
                "use one of them"
            )
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} is unknown; choose one of {WEIGHTS}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype={self.kv_dtype!r} is unknown; choose one of {KV_DTYPES}, or None for the model's")
        wide = self.kv_wide_window
        if not isinstance(wide, int) or isinstance(wide, bool):
            raise TypeError(f"kv_wide_window must be a number of tokens (int), got {wide!r}")
        if wide < 0:
            raise ValueError(f"kv_wide_window={wide} must not be negative; 0 stores all layers in kv_dtype")

    def kv_dtype_of(self, window: int | None) -> str | None:
        """`kv_dtype` for layers with this window."""
        return None if window is not None and window <= self.kv_wide_window else self.kv_dtype


def resolve_config(config: FastAttnConfig | None, options: dict[str, Any]) -> FastAttnConfig:
    """`config` as given, or a new one from keyword `options`.

    Raises:
        TypeError: both are given, `config` is of another type, or an option is unknown.
    """
    if config is not None and not isinstance(config, FastAttnConfig):
        raise TypeError(f"config must be a FastAttnConfig, got {type(config).__name__}")
    if config is not None and options:
        raise TypeError(f"give either config= or single options, not both (got {sorted(options)})")
    known = [field.name for field in fields(FastAttnConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown option(s) {unknown}; the options are {known}")
    return config if config is not None else FastAttnConfig(**options)
