"""For how many columns of a `generate()` call pages are made before its prompt is computed; see `pages/reach.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria

from hf_fastattn.pages.reach import FIRST


def columns_at_once(generation_config: Any, model_kwargs: dict[str, Any], most: int) -> int:
    """Those of the prompt and the first steps of a call of `most` columns, whether its rows may end or not."""
    new = generation_config.max_new_tokens
    prompt = _prompt_columns(model_kwargs) if new is None else max(most - new, 0)
    return min(prompt + FIRST, most)


def _prompt_columns(model_kwargs: dict[str, Any]) -> int:
    """0 if they are not known."""
    for name in ("attention_mask", "position_ids"):
        value = model_kwargs.get(name)
        if isinstance(value, Tensor) and value.ndim == 2:
            return value.shape[1]
    return 0


def may_end_early(stopping_criteria: Sequence[Any]) -> bool:
    """Whether a row may end before the greatest length."""
    return any(type(criterion) is not MaxLengthCriteria for criterion in stopping_criteria)
