"""A family is one entry: every class that it names exists in the installed Transformers, where its model type lives."""

from __future__ import annotations

import importlib.util

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.registry import FAMILIES, REFUSALS
from tests.tools.models import SINCE


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_classes_of_a_family_exist(family: Family) -> None:
    if family.model_type not in CONFIG_MAPPING:
        assert Version(transformers.__version__) < Version(SINCE[family.model_type])
        pytest.skip("newer than this Transformers")
    config = CONFIG_MAPPING[family.model_type]
    name = config.__module__.replace(".configuration_", ".modeling_")
    # A model type may have no classes of its own.
    modeling = importlib.import_module(name if importlib.util.find_spec(name) else MODEL_MAPPING[config].__module__)
    layers = family.layers
    causal_lm = (family.causal_lm,) if isinstance(family.causal_lm, str) else family.causal_lm
    named = [family.decoder, family.attention, *causal_lm, family.qk_norm]
    named += [] if layers is None else [layers.layer, layers.norm, layers.mlp]
    named += [] if layers is None or layers.delta is None else [layers.delta.module, layers.delta.norm]
    assert not [name for name in named if name and not hasattr(modeling, name)]


def test_no_model_type_is_both_supported_and_refused() -> None:
    assert not set(FAMILIES) & set(REFUSALS)
