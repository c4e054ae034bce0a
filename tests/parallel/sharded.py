"""What runs in each of the processes that gather all weights forward by forward: FSDP 2, and what ZeRO-3 does."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.models.llama import modeling_llama

import hf_fastattn
from hf_fastattn.patches.decoder import chunked_prefill
from tests.tools.models import tiny
from tests.tools.reexecuted import reexecuted_loop

# Tokens that rows begin alike with: more than a turn of its own has to save.
COMMON = 96


def ids_of(rank: int, kind: str, vocabulary: int) -> torch.Tensor:
    """Prompts of a rank: on rank 0 rows that begin alike, or equal ones; on the others always different ones."""
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(1, vocabulary, (3, COMMON + 8), generator=generator)
    if rank == 0 and kind == "begin alike":
        ids[:, :COMMON] = ids[0, :COMMON]
    if rank == 0 and kind == "equal":
        ids[:] = ids[0]
    return ids


def in_parts(model: Any, how: str) -> Any:
    """The model, of whose weights each process has a part from now on."""
    if how == "zero3":
        return partition(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "inside":
        # As accelerate's wrapping by size does, whatever a module is.
        for layer in model.model.layers:
            fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
    for layer in model.model.layers if how not in ("root", "inside") else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if how != "layers" else model


class Status(Enum):
    """As DeepSpeed's `ZeroParamStatus`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(model: Any) -> Any:
    """As ZeRO-3 does: parameters are empty, but while the forward of their module runs."""
    count, rank = dist.get_world_size(), dist.get_rank()

    def make_part(parameter: Any) -> None:
        whole = parameter.data
        flat = torch.zeros(-(-whole.numel() // count) * count)
        flat[: whole.numel()] = whole.flatten()
        parameter.part, parameter.whole_shape = flat.chunk(count)[rank].clone(), whole.shape
        parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module._parameters.values():
            held: Any = parameter
            if held is not None and held.ds_status is Status.NOT_AVAILABLE:
                parts = [torch.empty_like(held.part) for _ in range(count)]
                dist.all_gather(parts, held.part)
                held.data = torch.cat(parts)[: held.whole_shape.numel()].view(held.whole_shape)
                held.ds_status = Status.AVAILABLE

    def free(module: nn.Module, *_: Any) -> None:
        for parameter in module._parameters.values():
            held: Any = parameter
            if held is not None:
                held.data, held.ds_status = torch.empty(0), Status.NOT_AVAILABLE

    for parameter in model.parameters():
        make_part(parameter)
    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(free)
    return model


def generated(
    how: str, kind: str, call: dict[str, Any], patch_first: bool, change: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, Any, str]:
    """A patched model's tokens on this rank's prompts, one whole stock model's, counters, and the report.

    Args:
        how: "layers and root", "layers", "root", "inside" (attention, decoder and root) or "zero3".
        kind: of prompts, see `ids_of`; "long": for rank 0 alone they are long enough to be computed in pieces.
        change: factor on all weights between two calls of the model in parts, the second of which counts.
    """
    stock, model = tiny("llama"), tiny("llama")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, reexecuted_loop():
        warnings.simplefilter("ignore")
        if kind == "long" and dist.get_rank() == 0:
            patch.setattr(chunked_prefill, "CPU_TOKENS", COMMON)
        if patch_first:
            model = in_parts(hf_fastattn.patch(model, cuda_graphs=True), how)
        else:
            model = hf_fastattn.patch(in_parts(model, how), cuda_graphs=True)
        ids = ids_of(dist.get_rank(), kind, model.config.vocab_size)
        options = {"synced_gpus": True, **call} if how in ("zero3", "layers") else call
        with torch.no_grad():
            if change is not None:
                model.generate(ids, **options)
                for module in model.modules():
                    # The root's are whole until they are trained on.
                    if isinstance(module, FSDPModule):
                        module.reshard()
                for whole, part in zip(stock.parameters(), model.parameters(), strict=True):
                    whole.mul_(change)
                    held: Any = getattr(part, "part", None)
                    (part._local_tensor if held is None else held).mul_(change)
            torch.manual_seed(dist.get_rank())
            ours = model.generate(ids, **options)
            torch.manual_seed(dist.get_rank())
            want = stock.generate(ids, **call)
        report = hf_fastattn.report(model)
        assert report.pages_in_use == 0
        hf_fastattn.unpatch(model)
        with torch.no_grad():
            assert torch.equal(model.generate(ids, **{**options, "max_new_tokens": 2})[:, : ids.shape[1]], ids)
    return ours, want, report.last_call, str(report)


def with_another_rope(patch_first: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens of a sharded model that was patched, and of a whole one that was not, once RoPE was exchanged by name."""
    stock, model = tiny("llama"), tiny("llama")
    model = in_parts(hf_fastattn.patch(model), "inside") if patch_first else hf_fastattn.patch(in_parts(model, "inside"))
    ids, rotate = ids_of(dist.get_rank(), "different", model.config.vocab_size), modeling_llama.apply_rotary_pos_emb
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: rotate(-3 * q, k, *rest))
        ours = model.generate(ids, max_new_tokens=8, do_sample=False)
        want = stock.generate(ids, max_new_tokens=8, do_sample=False)
    return ours, want, hf_fastattn.report(model).last_call


def error_of_streaming(how: str) -> str:
    model = in_parts(tiny("llama"), how)
    try:
        hf_fastattn.patch(model, streaming=hf_fastattn.Streaming(sinks=4, window=64))
    except ValueError as error:
        return str(error)
    return ""
