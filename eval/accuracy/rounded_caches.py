"""Stock Transformers with keys and values rounded as pages of 8 bits round them: what a model patched so must compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_fastattn.kernels.page_formats import KV_DTYPES, quantise


def rounded(x: Tensor, kv_dtype: str) -> Tensor:
    """`x: [..., D]` as it is read back."""
    numbers, scales = quantise(x.detach(), KV_DTYPES[kv_dtype])
    return (numbers.float() * scales.float()[..., None]).to(x.dtype)


@contextmanager
def rounded_caches(kv_dtype: str | None, wide_window: int = 1024) -> Iterator[None]:
    """Inside, dynamic caches round what they are given; layers with a window of at most `wide_window` tokens do not."""

    def rounding(update: Callable[..., Any]) -> Callable[..., Any]:
        def update_rounded(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kv_dtype is not None and getattr(self, "sliding_window", wide_window + 1) > wide_window:
                keys, values = rounded(keys, kv_dtype), rounded(values, kv_dtype)
            return update(self, keys, values, *args, **kwargs)

        return update_rounded

    full, sliding = (vars(kind)["update"] for kind in (DynamicLayer, DynamicSlidingWindowLayer))
    with patch.object(DynamicLayer, "update", rounding(full)):
        with patch.object(DynamicSlidingWindowLayer, "update", rounding(sliding)), torch.no_grad():
            yield
