"""`rehearse_choice`: the kernels that choose tokens, compiled beside those of the prompt that comes before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.autocast import accelerate_region, forward_dtype
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.module_checks import why_not_module
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.loop.device_state import DeviceState, bucket_of
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.request import LoopRequest
from hf_fastattn.loop.token_choice import choose


def rehearse_choice(
    model: Any, request: LoopRequest, cache: PagedCache, rows: int, logits_of: Callable[[Any, Tensor], Tensor]
) -> None:
    """Launch what a loop launches behind its first logits and those of a step, over tensors that hold nothing.

    Called in a rehearsal. What it leaves out, `DecodeLoop` rehearses when it begins.

    Args:
        rows: of the batch.
        logits_of: the output layer and hidden states `[T, hidden]`, to logits `[T, V]`.
    """
    head = model.lm_head
    recorded = request.processors or request.forced is not None or cache.stream is not None
    # What is not launched is arbitrary: only kernels may read it, and nobody else's code is called once more.
    if recorded or why_not_module(head, model.device) is not None or head.weight.device != model.device:
        return
    region, used = forward_dtype(model), bucket_of(rows)
    state = DeviceState(model.device, used, 1, cache.tables, len(head.weight))

    def finish(count: int, logits: Tensor) -> None:
        penalised = request.choice.repetition_penalty != 1.0
        key = GraphKey(count, request.do_sample, penalised, request.choice.min_new_tokens > 0)
        choose(state, key, logits)
        advance(state.tensors(max(count, used), penalised), cache.groups.page_size)

    # accelerate's wrapper, which the prompt's forward runs in, gives fp32; steps have none.
    first = torch.float32 if accelerate_region(model) is not None else region or head.weight.dtype
    finish(rows, torch.empty(rows, state.vocabulary, dtype=first, device=model.device))
    if request.max_new > 1 and region is None:
        finish(used, logits_of(head, torch.zeros(used, head.weight.shape[1], dtype=head.weight.dtype, device=model.device)))
    elif request.max_new > 1:
        # Under autocast the output layer reads copies of its weights, which are not there yet.
        finish(used, torch.empty(used, state.vocabulary, dtype=region, device=model.device))
