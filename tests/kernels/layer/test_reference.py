"""Both forms of RMSNorm against Transformers' own modules, bit for bit: they round at different places."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from hf_fastattn.kernels.layer.reference import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Qwen3NextRMSNorm, Qwen3_5RMSNorm])
def test_rms_norm(norm: type, dtype: torch.dtype) -> None:
    module = norm(48, eps=1e-5).to(dtype)
    module.weight.data = (module.weight + 0.3 * torch.randn(48)).to(dtype)
    x = (3 * torch.randn(63, 5, 48)).to(dtype)
    unit_offset = norm is not LlamaRMSNorm
    ours = rms_norm(x, module.weight, 1e-5, unit_offset)
    assert ours.dtype == dtype
    assert torch.equal(ours, module(x))
    if dtype != torch.float32:
        shifted = module.weight - 1 if norm is LlamaRMSNorm else module.weight + 1
        assert not torch.equal(rms_norm(x, shifted.to(dtype), 1e-5, not unit_offset), module(x))
