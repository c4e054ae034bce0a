"""The tiny models cover every family."""

from __future__ import annotations

import transformers
from packaging.version import Version

from hf_fastattn.patches.registry import FAMILIES
from tests.tools.models import MODELS, SINCE, VISION_MODELS


def test_every_family_has_a_tiny_model() -> None:
    plain = [getattr(transformers, f"{name}Config", None) for name, _ in MODELS.values()]
    towers = [getattr(transformers, f"{name}Config", None) for name, *_ in VISION_MODELS.values()]
    tested = {config.model_type for config in plain if config is not None}
    tested |= {config.sub_configs["text_config"].model_type for config in towers if config is not None}
    # A family that this Transformers lacks has a line all the same.
    tested |= {name for name, since in SINCE.items() if Version(transformers.__version__) < Version(since)}
    assert not set(FAMILIES) - tested
