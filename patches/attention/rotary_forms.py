"""Which rotary embeddings are `cos(position * inv_freq) * attention_scaling`: some of Transformers, by their forward's text.

What a forward computes is not seen from a few positions, and classes of one name differ between versions. So it is read: the
text without comments is one of those below, and nothing stands around it but Transformers' own decorators. Every other
rotary embedding is called.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fastattn.graphs.module_checks import why_not_module
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.patches.modules.plain_modules import is_plain_tensor
from hf_fastattn.wrappers import origin_of

DECORATORS = ("torch.utils._contextlib", "transformers.modeling_rope_utils")
# Transformers 5.23 and later; then the forms of 5.17, whose angles are matrix products.
PRODUCT = """
def forward(self, x, position_ids):
    freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    emb = torch.cat((freqs, freqs), dim=-1)
    cos = emb.cos() * self.attention_scaling
    sin = emb.sin() * self.attention_scaling
    return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)
"""
MATRIX_PRODUCT = """
def forward(self, x, position_ids):
    inv_freq_expanded = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1).to(x.device)
    position_ids_expanded = position_ids[:, None, :].float()
    device_type = x.device.type if isinstance(x.device.type, str) and x.device.type != "mps" else "cpu"
    with maybe_autocast(device_type=device_type, enabled=False):
        freqs = (inv_freq_expanded.float() @ position_ids_expanded.float()).transpose(1, 2)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
    return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)
"""
WIDENED_FIRST = MATRIX_PRODUCT.replace(
    ".float().expand(position_ids.shape[0], -1, 1).to(x.device)",
    ".expand(position_ids.shape[0], -1, 1).to(dtype=torch.float, device=x.device)",
).replace(".float() @ position_ids_expanded.float()", " @ position_ids_expanded")


class Frequencies(NamedTuple):
    """What a rotary embedding computes from: `inv_freq: [rotary dims / 2]`, and the factor on cos and sin."""

    inv_freq: Tensor
    factor: float


def frequencies_of(rotary: Any, device: torch.device) -> Frequencies | None:
    """The frequencies of a rotary embedding of the known form, on the device; None of every other."""
    by_matrix = _is_matrix_product(type(rotary).forward)
    # TF32 rounds angles, if cuBLAS takes it: only PyTorch knows.
    if by_matrix is None or (by_matrix and _multiplies_in_tf32()) or why_not_module(rotary, device) is not None:
        return None
    inv_freq, factor = rotary._buffers.get("inv_freq"), getattr(rotary, "attention_scaling", None)
    if not isinstance(factor, float | int) or not is_plain_tensor(inv_freq, device, DTYPES) or inv_freq.ndim != 1:
        return None
    return Frequencies(inv_freq, float(factor))


@functools.lru_cache(maxsize=64)
def _is_matrix_product(forward: Any) -> bool | None:
    """Whether the forward of a class takes matrix products for angles; None if it has none of the known forms."""
    while hasattr(forward, "__wrapped__"):
        if origin_of(forward) not in DECORATORS:
            return None
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    if not isinstance(code, CodeType) or not origin_of(forward).startswith("transformers.models."):
        return None
    try:
        text = _plain(inspect.getsource(code))
    except (OSError, SyntaxError):
        return None
    return _forms().get(text)


@functools.cache
def _forms() -> dict[str, bool]:
    """Whether a form takes matrix products, by its text."""
    return {_plain(form): form is not PRODUCT for form in (PRODUCT, MATRIX_PRODUCT, WIDENED_FIRST)}


def _plain(source: str) -> str:
    """A function without decorators and comments, in one layout."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list.clear()
    return ast.unparse(function)


def _multiplies_in_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
