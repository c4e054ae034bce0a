"""Rows with different adapters (PEFT's `adapter_names=`) where fused layers compute them instead of PEFT's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.graphs.module_checks import names_by_row, submodules
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.loop.row_adapters import RowAdapters
from hf_fastattn.patches.fused.adapter_stacks import TokenAdapters
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.patches.modules.lora_modules import adapted_parameters
from hf_fastattn.patches.modules.product_layers import product_layers


def why_not_by_row(decoder: Any, rows: Sequence[str], lm_head: nn.Module | None = None) -> str | None:
    """Why fused layers cannot give each row its adapter, as PEFT's hooks ask for it; None if they can.

    Args:
        decoder: patched.
        rows: the adapter of each row, as one of the hooks has it.
        lm_head: the output layer, if it is computed with them.
    """
    reason = fused_reason(decoder)
    if reason is not None:
        return f"adapters are chosen by row, and {reason}"
    names, ours = RowAdapters.of(rows).names, set()
    for linear in product_layers(decoder, decoder.device, lm_head):
        if names_by_row(linear) is not None:
            ours.add(id(linear))
            if adapted_parameters(linear, decoder.device, DTYPES, names) is None:
                return f"adapters are chosen by row in a {type(linear).__name__} that is more than a plain LoRA layer"
    for module in (*submodules(decoder), *([] if lm_head is None else [lm_head, *submodules(lm_head)])):
        chosen = names_by_row(module)
        if chosen is not None and (id(module) not in ours or list(chosen) != list(rows)):
            return f"adapters are chosen by row in a {type(module).__name__} that is called"
    return None


def of_tokens(adapters: RowAdapters, visible: Tensor, device: torch.device) -> TokenAdapters:
    """The adapters of the tokens of a padded batch, padding taken out.

    Args:
        visible: `[B, S]` bool on the host, True where there is a token.
    """
    numbers = torch.tensor(adapters.numbers, dtype=torch.int32).repeat_interleave(visible.sum(1))
    return TokenAdapters(numbers.to(device, non_blocking=True), adapters.names)
