"""For how many columns of a `generate()` call pages are made before its prompt is computed; see `pages/reach.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria

from hf_fastattn.pages.reach import FIRST


def columns_at_once(model_kwargs: dict[str, Any], most: int) -> int:
    """Those of the prompt and the first steps of a call of `most` columns, whether its rows may end or not."""
    mask = model_kwargs.get("attention_mask")
    return min(mask.shape[1] + FIRST, most) if isinstance(mask, Tensor) and mask.ndim == 2 else most


def may_end_early(stopping_criteria: Sequence[Any]) -> bool:
    """Whether a row may end before the greatest length."""
    return any(type(criterion) is not MaxLengthCriteria for criterion in stopping_criteria)
