"""A family is one entry: every class that it names exists in the installed Transformers, where its model type lives."""

from __future__ import annotations

import importlib.util

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.registry import FAMILIES, REFUSALS
from tests.tools.models import OLD


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_classes_of_a_family_exist(family: Family) -> None:
    if family.model_type not in CONFIG_MAPPING and OLD:
        pytest.skip("this Transformers is older than the model")
    config = CONFIG_MAPPING[family.model_type]
    name = config.__module__.replace(".configuration_", ".modeling_")
    # A model type may have no classes of its own.
    modeling = importlib.import_module(name if importlib.util.find_spec(name) else MODEL_MAPPING[config].__module__)
    layers = family.layers
    named = [family.decoder, family.attention, family.causal_lm, family.qk_norm]
    named += [] if layers is None else [layers.layer, layers.norm, layers.mlp]
    assert not [name for name in named if name and not hasattr(modeling, name)]


def test_no_model_type_is_both_supported_and_refused() -> None:
    assert not set(FAMILIES) & set(REFUSALS)
