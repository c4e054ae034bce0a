"""What must not move (CONTRIBUTING.md): names, fields, defaults, signatures and schemas that users rely on."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields

import torch

import hf_fastattn
from hf_fastattn.counters import CallCounters
from hf_fastattn.kernels import ops
from hf_fastattn.report import Report

LAUNCHERS = {
    "attention.append": ("rope_append",),
    "attention.decode": ("paged_decode",),
    "attention.hopper_prefill": ("hopper_prefill",),
    "attention.merge": ("merge_states",),
    "attention.paged": ("paged_attention",),
    "attention.prefill": ("paged_prefill",),
    "attention.shared_prefix": ("paged_decode_shared",),
    "attention.workspace": ("Workspace",),
    "layer.activation": ("silu_and_mul",),
    "layer.matvec": ("matvec", "gate_up_silu"),
    "layer.norm": ("rms_norm", "add_rms_norm"),
    "sampling.advance": ("advance",),
    "sampling.draw": ("sample_tokens",),
    "sampling.greedy": ("greedy_tokens",),
    "sampling.penalty": ("process_logits",),
}


def test_public_names() -> None:
    assert hf_fastattn.__all__ == [
        "CacheFullError", "FastAttnConfig", "PagePool", "PagedCache", "PatchScope", "StockAttentionError", "Streaming",
        "Variant", "VariantError", "append", "fork", "patch", "patched", "register", "release_memory", "report", "truncate",
        "unpatch", "warm_up",
    ]  # fmt: skip


def test_options_and_defaults() -> None:
    assert {field.name: field.default for field in fields(hf_fastattn.FastAttnConfig)} == {
        "page_size": 16, "memory_limit": None, "keep_memory": 1.0, "backend": "auto",
        "batch_invariant": False, "cuda_graphs": True, "sampling": "fast",
        "keep_in_training": False, "autocast_copies": True, "prefix_cache": False, "weights": "check",
        "streaming": None,
        "kv_dtype": None, "kv_wide_window": 1024, "mixed_steps": True,
    }  # fmt: skip


def test_fields_of_reports() -> None:
    report = "patched family backend backend_reason config modules last_call pages_in_use page_bytes_allocated"
    assert {field.name for field in fields(Report)} >= set(report.split())
    counted = "forwards fallbacks prompt_tokens pages_allocated pages_shared pages_copied graphs_captured graphs_replayed"
    counted += " appends_captured appends_replayed fast_loops uncaptured not_looped adapters_fused quantised_products"
    assert {field.name for field in fields(CallCounters)} >= set(counted.split())


def test_signature_of_the_cache() -> None:
    parameters = list(inspect.signature(hf_fastattn.PagedCache).parameters.values())
    assert [parameter.name for parameter in parameters] == ["config", "fastattn_config", "groups", "counters", "room"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])


def test_schemas_of_the_operators() -> None:
    assert ops.__name__ == "hf_fastattn.kernels.ops"
    given = {name: str(getattr(torch.ops.hf_fastattn, name).default._schema) for name in ("paged_attention", "rope_append")}
    assert given["paged_attention"] == (
        "hf_fastattn::paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor cu_seqlens_q, "
        "Tensor seq_lens, float scale, SymInt? window=None, float? softcap=None, SymInt shared_pages=0, "
        "SymInt? max_query_len=None) -> (Tensor, Tensor)"
    )
    # Versions of PyTorch write the same number with more digits or fewer.
    assert re.sub(r"eps=[\d.e-]+", "eps=1e-06", given["rope_append"]) == (
        "hf_fastattn::rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a5!) k_pages, "
        "Tensor(a6!) v_pages, Tensor slot_mapping, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-06, "
        "bool unit_offset=False) -> Tensor"
    )
    merged = str(torch.ops.hf_fastattn.merge_states.default._schema)
    assert merged == "hf_fastattn::merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"


def test_launchers_have_their_names() -> None:
    for module, names in LAUNCHERS.items():
        found = importlib.import_module(f"hf_fastattn.kernels.{module}")
        assert [name for name in names if not callable(getattr(found, name, None))] == []
