"""RoPE inside attention by a model's own frequencies: the same tokens as Transformers, for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn import PagedCache, StockAttentionError, Variant
from hf_fastattn.transformers_version import CACHE
from tests.generation.test_streaming import ROPES, model_with
from tests.tools.models import VOCAB, assert_fast, tiny
from tests.tools.reexecuted import reexecuted_loop

INSIDE = Variant(rope="inside")


def prompts(rows: int = 3, columns: int = 40) -> dict[str, Any]:
    torch.manual_seed(5)
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[0, :13] = 0
    ids = torch.randint(1, VOCAB, (rows, columns))
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("rope", ROPES)
def test_every_scaling(rope):
    model = model_with(rope)
    want = model.generate(**prompts())
    with hf_fastattn.patched(model, variant=INSIDE):
        got = model.generate(**prompts())
        assert assert_fast(model).fast_loops == 0
        with reexecuted_loop():
            looped = model.generate(**prompts())
            calls = assert_fast(model)
            assert calls.fast_loops == 1 and calls.graphs_captured == 1 and not calls.uncaptured
    assert torch.equal(got, want) and torch.equal(looped, want)


def test_rows_of_several_runs():
    """Prompts, appends and steps whose keys lie in several runs of positions, in rows that begin at different columns."""
    model, call = model_with("yarn"), {**prompts(2, 250), "max_new_tokens": 20}
    want, logits = model.generate(**call), model(call["input_ids"]).logits
    with hf_fastattn.patched(model, variant=INSIDE), reexecuted_loop(), torch.no_grad():
        assert torch.equal(model.generate(**call), want)
        assert assert_fast(model).fast_loops == 1
        cache, parts = PagedCache(model.config), call["input_ids"].split([100, 90, 60], 1)
        got = torch.cat([model(part, **{CACHE: cache}).logits for part in parts], 1)
        # Stock's own error against fp64 is 2e-4 here.
        torch.testing.assert_close(got, logits, atol=1e-3, rtol=1e-3)
        cache.reset()


def test_frequencies_that_depend_on_the_length_are_those_of_the_rows():
    """Within the length that a model was made for, and past it."""
    torch.manual_seed(3)
    scaling = {"rope_theta": 10000.0, **ROPES["longrope"], "original_max_position_embeddings": 64}
    model = tiny("llama", rope_parameters=scaling)
    torch.manual_seed(5)
    tokens = torch.randint(1, VOCAB, (1, 90))
    want = {length: model(tokens[:, :length]).logits for length in (40, 90)}
    with hf_fastattn.patched(model, variant=INSIDE), torch.no_grad():
        for length in (40, 90, 40):
            torch.testing.assert_close(model(tokens[:, :length]).logits, want[length], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3", "smollm3", "granite", "mixtral", "ministral3", "exaone4"])
def test_families(family):
    """Part of a head rotated, norms, layers without RoPE, layers that are called, experts, scaled queries, windows."""
    torch.manual_seed(3)
    model = tiny(family)
    want = model.generate(**prompts())
    with hf_fastattn.patched(model, variant=INSIDE):
        assert torch.equal(model.generate(**prompts()), want)
        assert_fast(model)


def test_with_a_function_and_without_change():
    """A score function sees rotated vectors; patching again with an equal variant is a no-op."""
    model, variant = model_with(), Variant(score_mod=lambda score, b, h, q_idx, kv_idx: score - 0.1 * (q_idx - kv_idx))
    with hf_fastattn.patched(model, variant=variant):
        want = model.generate(**prompts())
    inside = Variant(score_mod=variant.score_mod, rope="inside")
    with hf_fastattn.patched(model, variant=inside):
        hf_fastattn.patch(model, variant=Variant(score_mod=variant.score_mod, rope="inside"))
        assert torch.equal(model.generate(**prompts()), want)
        assert_fast(model)
        with pytest.raises(ValueError, match="another variant"):
            hf_fastattn.patch(model)


def test_some_layers_only():
    model = model_with()
    want = model.generate(**prompts())
    with hf_fastattn.patched(model, variant=lambda layer: INSIDE if layer == 1 else None):
        assert torch.equal(model.generate(**prompts()), want)
        assert_fast(model)


def test_keys_of_others_are_refused():
    """A cache of Transformers holds rotated keys."""
    model, held = model_with(), DynamicCache()
    call = prompts(1)
    model.generate(**{**call, "max_new_tokens": 2}, **{CACHE: held})
    with hf_fastattn.patched(model, variant=INSIDE):
        longer = {**call, "input_ids": torch.cat((call["input_ids"], call["input_ids"]), 1), "attention_mask": None}
        with pytest.raises(StockAttentionError, match="RoPE is inside attention"):
            model.generate(**longer, **{CACHE: held})
        cache = PagedCache(model.config)
        model.generate(**{**call, "max_new_tokens": 2}, **{CACHE: cache})
        cache.layers[0].keys = cache.layers[0].keys
        with pytest.raises(StockAttentionError, match="RoPE is inside attention"):
            model.generate(**longer, **{CACHE: cache})


def test_what_does_not_rotate_halves_by_frequencies():
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="three axes"):
        hf_fastattn.patch(tiny("qwen2_vl"), variant=INSIDE)
    model = model_with()
    model.model.rotary_emb.forward = lambda x, position_ids: (x.new_ones(1, 3, 16), x.new_zeros(1, 3, 16))
    with pytest.raises(ValueError, match="does not rotate halves"):
        hf_fastattn.patch(model, variant=INSIDE)
    model = model_with()
    with hf_fastattn.patched(model, variant=INSIDE):
        with pytest.raises(ValueError, match="positions past 1048576"):
            model._fastattn.runtime.variants.reach(2**20 + 1)
