"""FlashInfer's kernels on the inputs of the attention benchmark, where FlashInfer is installed."""

from __future__ import annotations

import importlib.util

import torch

from hf_fastattn.eval.kernel_speed.attention_cases import DIM, GROUPS, HEADS, Inputs
from hf_fastattn.eval.kernel_speed.graph_timer import Launch

WORKSPACE_BYTES = 256 * 2**20


def flashinfer_launches(inputs: Inputs) -> dict[str, Launch]:
    """Its paged decode (tensor cores) or prefill, planned beforehand; nothing where it is missing or there is no GPU."""
    device = inputs.page_table.device
    if device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return {}
    import flashinfer

    shape, page = inputs.shape, inputs.k_pages[0].shape[1]
    columns = torch.tensor([-(-length // page) for length in shape.lengths])
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), columns.cumsum(0))).int()
    indices = torch.cat([row[:count] for row, count in zip(inputs.page_table, columns.tolist(), strict=True)])
    last = torch.tensor([(length - 1) % page + 1 for length in shape.lengths], dtype=torch.int32)
    space = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    heads = (HEADS, GROUPS, DIM, page)
    dtype = inputs.q[0].dtype
    if shape.kind == "decode":
        planned = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        planned.plan(indptr, indices, last, *heads, q_data_type=dtype, kv_data_type=dtype)
    else:
        planned = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        planned.plan(
            inputs.cu_seqlens_q, indptr.to(device), indices, last.to(device), *heads, causal=True, q_data_type=dtype
        )
    sets = list(zip(inputs.q, inputs.k_pages, inputs.v_pages, strict=True))
    return {"flashinfer": lambda i: planned.run(sets[i % len(sets)][0], sets[i % len(sets)][1:])}
