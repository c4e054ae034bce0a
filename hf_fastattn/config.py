"""The options of `hf_fastattn.patch`, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

BACKENDS = ("auto", "reference", "triton", "hopper")
SAMPLING_MODES = ("fast", "transformers")


@dataclass(frozen=True)
class FastAttnConfig:
    """How a patched model stores its K/V pages and computes attention.

    Args:
        page_size: tokens a page holds; a power of two from 1 to 1024.
        memory_limit: most bytes that the pages of one model may take, over all layers; `None` sets no limit.
        keep_memory: share (0 to 1) of the page storage kept allocated between `generate()` calls when no cache
            holds a page. A model in train mode keeps nothing, so that a training step finds its memory free.
        backend: `"reference"` (PyTorch, any device), `"triton"` (CUDA devices), `"hopper"` (these, and Gluon kernels for
            long prompts on H100 and H200), or `"auto"`, the last of them that can run.
        batch_invariant: attention of a row is bitwise the same whatever rows are computed with it (He et al., 2025,
            "Defeating Nondeterminism in LLM Inference"); matrix products around it are PyTorch's. Triton backends only;
            slower for few rows.
        cuda_graphs: on a CUDA device, decode steps are recorded once as CUDA graphs and replayed.
        sampling: how tokens are drawn where steps are replayed: `"fast"`, inside the step, by random numbers that depend on
            a seed from torch's generator, the row and the step alone; or `"transformers"`, by its own code, with its draws.

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
        if not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant must be True or False, got {self.batch_invariant!r}")
        if self.batch_invariant and self.backend == "reference":
            raise ValueError("batch_invariant=True needs the Triton kernels; use backend='auto' or 'triton'")
        if not isinstance(self.cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be True or False, got {self.cuda_graphs!r}")
        if self.sampling not in SAMPLING_MODES:
            raise ValueError(f"sampling={self.sampling!r} is unknown; choose one of {SAMPLING_MODES}")


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
