"""A layer's Gated DeltaNet between its norm and the residual stream: projections, then the rule over the rows' states."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.recurrent_layer import MOST_KEPT, Pair
from hf_fastattn.kernels.linear import delta_reference
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights, StepStates
from hf_fastattn.kernels.linear.delta_sizes import why_not_sizes
from hf_fastattn.parallel.peer_memory import Delta
from hf_fastattn.patches.family import DeltaNames
from hf_fastattn.patches.fused.any_products import AnyProducts
from hf_fastattn.patches.fused.plain_products import PlainProducts
from hf_fastattn.patches.modules.plain_modules import is_plain, is_plain_tensor, norm_eps, norm_weight
from hf_fastattn.transformers_version import CACHE

# Functions that a module looks up by name, and packages whose functions compute the same.
LOOKED_UP = (
    "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update",
)  # fmt: skip
EQUIVALENT = ("transformers.", "fla.", "causal_conv1d.", "kernels.")


def why_not_delta(module: Any, names: DeltaNames, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a linear attention has to be called; None if it does what its class does and our operations take it.

    Its projections and `out_proj` may be of any kind: those that are not plain are called.
    """
    if not is_plain(module, names.module, device):
        return f"a {type(module).__name__} was replaced or has hooks"
    if region_dtype(device) is not None:
        return "a linear attention under autocast"
    if module.activation != "silu":
        return f"a linear attention with {module.activation}"
    conv, norm, held = module._modules["conv1d"], module._modules["norm"], vars(sys.modules[type(module).__module__])
    for name in LOOKED_UP:
        if name in held and not str(getattr(held[name], "__module__", "")).startswith(EQUIVALENT):
            return f"{type(module).__module__}.{name} was replaced"
    plain = type(conv) is nn.Conv1d and is_plain(conv, "Conv1d", device) and conv.bias is None
    plain = plain and norm_weight(norm, names.norm, device, (dtype,)) is not None
    each = (module._parameters.get("A_log"), module._parameters.get("dt_bias"))
    wide = (dtype, torch.float32)
    if not plain or not all(is_plain_tensor(one, device, wide) for one in each) or conv.weight.dtype is not dtype:
        return f"parts of a {type(module).__name__} were replaced or have hooks"
    return why_not_sizes(module.head_k_dim, module.head_v_dim, module.conv_kernel_size)


def add_delta(
    module: Any, norm: Any, x: Tensor, delta: Delta, products: AnyProducts, cache: PagedCache
) -> tuple[Tensor, Delta]:
    """The residual stream with the output of a linear attention in it, or as it was and the output beside it.

    Args:
        module: for which `why_not_delta` has no reason.
        norm: before it, of `x + delta`.
        cache: with a paged batch under way; gives and takes the states of its rows.
    """
    inner = module._modules
    normed, x = products.norm(norm, x, delta)
    inputs = _inputs(module, inner, normed, products)
    weights = DeltaWeights(
        inner["conv1d"].weight.squeeze(1), module.A_log, module.dt_bias, inner["norm"].weight, norm_eps(inner["norm"])
    )
    past = cache.past_states(module.layer_idx)
    if past is not None:
        out = _recorded(inputs, weights, products, cache, module.layer_idx, past)
    else:
        rule = _prefilled if cache.paged_batch is None or not cache.paged_batch.is_decode else _stepped
        out = rule(inputs, weights, products, cache, module.layer_idx)
    return products.add_product(inner["out_proj"], out, x)


def _inputs(module: Any, inner: dict[str, Any], x: Tensor, products: AnyProducts) -> DeltaInputs:
    heads, shared = module.num_k_heads, module.num_v_heads // module.num_k_heads
    dk, dv = module.head_k_dim, module.head_v_dim
    if "in_proj_qkvz" in inner:
        # Interleaved by key heads.
        qkvz, ba = products.multiply((inner["in_proj_qkvz"], inner["in_proj_ba"]), x)
        q, k, v, z = qkvz.unflatten(1, (heads, -1)).split((dk, dk, shared * dv, shared * dv), 2)
        b, a = ba.unflatten(1, (heads, -1)).split((shared, shared), 2)
    else:
        qkv, flat_z = products.multiply((inner["in_proj_qkv"], inner["in_proj_z"]), x)
        q, k, v = qkv.split((heads * dk, heads * dk, heads * shared * dv), 1)
        q, k, v, z = (part.unflatten(1, (heads, -1)) for part in (q, k, v, flat_z))
        b, a = (part.unflatten(1, (heads, -1)) for part in products.multiply((inner["in_proj_b"], inner["in_proj_a"]), x))
    return DeltaInputs(q, k, v.unflatten(2, (shared, dv)), z.unflatten(2, (shared, dv)), b, a)


def _stepped(x: DeltaInputs, weights: DeltaWeights, products: AnyProducts, cache: PagedCache, index: int) -> Tensor:
    states = cache.step_states(index)
    held = cache.layer_states(index) if states is None else None
    if states is None and held is None:
        return _prefilled(x, weights, products, cache, index)
    if held is not None:
        out, *after = _updated(x, weights, products, *held)
        cache.keep_states(index, *after)
        return out
    assert states is not None
    return _step(x, weights, states, products)


def _updated(
    x: DeltaInputs, weights: DeltaWeights, products: AnyProducts, conv: Tensor, recurrent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row: the output, and both states after it; those before stay as they are."""
    if isinstance(products, PlainProducts):
        return delta_reference.delta_update(x, weights, conv, recurrent)
    slots = _numbers(len(conv), conv.device)
    states = StepStates(conv, recurrent, slots, torch.empty_like(conv), torch.empty_like(recurrent), slots)
    return _step(x, weights, states, products), states.conv_out, states.recurrent_out


def _recorded(
    x: DeltaInputs, weights: DeltaWeights, products: AnyProducts, cache: PagedCache, index: int, past: list[Pair]
) -> Tensor:
    """Rows of as many tokens each, of which the last ones run one by one: the states after each of them are kept."""
    assert cache.paged_batch is not None
    _check_held(bool(past), cache, index)
    rows = cache.paged_batch.rows
    by_row = DeltaInputs(*(part.unflatten(0, (rows, -1)) for part in x))
    each, outs = by_row.q.shape[1], []
    at_once = max(each - MOST_KEPT, 0 if past else 1)
    if at_once:
        begun = DeltaInputs(*(part[:, :at_once].flatten(0, 1) for part in by_row))
        before = past[-1] if past else (None, None)
        out, conv, recurrent = _rule_of_prompts(products)(begun, weights, [at_once] * rows, *before)
        outs, past = [out.unflatten(0, (rows, -1))], [(conv, recurrent)]
    for number in range(at_once, each):
        out, conv, recurrent = _updated(DeltaInputs(*(part[:, number] for part in by_row)), weights, products, *past[-1])
        outs.append(out[:, None])
        past.append((conv, recurrent))
    cache.keep_past(index, past)
    return torch.cat(outs, 1).flatten(0, 1)


def _step(x: DeltaInputs, weights: DeltaWeights, states: StepStates, products: AnyProducts) -> Tensor:
    if isinstance(products, PlainProducts):
        return delta_reference.delta_step(x, weights, states)
    # Not before: it imports Triton.
    from hf_fastattn.kernels.linear.delta_step import delta_step

    return delta_step(x, weights, states, products.arrivals(x.v[..., 0].numel()))


@functools.lru_cache(maxsize=16)
def _numbers(rows: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(rows, dtype=torch.int32, device=device)


def _prefilled(x: DeltaInputs, weights: DeltaWeights, products: AnyProducts, cache: PagedCache, index: int) -> Tensor:
    assert cache.paged_batch is not None
    before, lengths = cache.layer_states(index) or (None, None), cache.paged_batch.known.query_lens
    _check_held(before[0] is not None, cache, index)
    out, conv, recurrent = _rule_of_prompts(products)(x, weights, lengths, *before)
    cache.keep_states(index, conv, recurrent)
    return out


def _check_held(held: bool, cache: PagedCache, index: int) -> None:
    if not held and cache.past_columns:
        raise ValueError(f"layer {index} has lost its state, as an interrupt may do; use a new {CACHE}")


def _rule_of_prompts(products: AnyProducts) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if isinstance(products, PlainProducts):
        return delta_reference.delta_prefill
    # Not before: it imports Triton.
    from hf_fastattn.kernels.linear.delta_prefill import delta_prefill

    return delta_prefill
