"""`patch_served()`: Transformers' own server, `transformers serve`, patches every model that it loads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_fastattn.config import FastAttnConfig, resolve_config
from hf_fastattn.patching import patch

logger = logging.getLogger("hf_fastattn")


@contextmanager
def patch_served(config: FastAttnConfig | None = None, **options: Any) -> Iterator[None]:
    """Models that a `transformers.cli.serve.Serve` of this process loads inside the block are patched.

    What cannot be patched is served as ever, with a warning that says why. With `continuous_batching=True` requests over
    HTTP join and leave our running batch; without it each is a `generate()`. Models that are loaded stay patched.

    Args:
        config, options: of `patch`.

    Raises:
        TypeError, ValueError: an option is unknown or out of its range.
    """
    from transformers.cli.serving.model_manager import ModelManager

    resolved = resolve_config(config, options)
    load = ModelManager._load_model

    @functools.wraps(load)
    def load_and_patch(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        try:
            patch(model, resolved)
        except (TypeError, ValueError) as error:
            logger.warning("hf_fastattn: %s is served unpatched: %s", type(model).__name__, error)
        return model

    ModelManager._load_model = load_and_patch
    try:
        yield
    finally:
        ModelManager._load_model = load
