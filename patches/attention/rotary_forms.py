"""Which rotary embeddings are `cos(position * inv_freq) * attention_scaling`: some of Transformers, known by their code.

What a forward computes is not seen from a few positions, and classes of one name differ between versions. So its code is
compared: it is what one of the texts below compiles to, and nothing stands around it but Transformers' own decorators. Not
its source, which is read from a file: by then that may hold another version. Every other rotary embedding is called.
"""

from __future__ import annotations

import functools
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fastattn.graphs.module_checks import why_not_module
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.patches.modules.plain_modules import is_plain_tensor
from hf_fastattn.wrappers import origin_of

NO_GRAD, ROPE_UTILS = "torch.utils._contextlib", "transformers.modeling_rope_utils"
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
    # Whatever can be called may stand where the module was.
    by_matrix = _is_matrix_product(type(rotary).forward) if isinstance(rotary, nn.Module) else None
    # TF32 rounds angles, if cuBLAS takes it: only PyTorch knows.
    if by_matrix is None or (by_matrix and _multiplies_in_tf32()) or why_not_module(rotary, device) is not None:
        return None
    inv_freq: Any = getattr(rotary, "inv_freq", None)
    factor: Any = getattr(rotary, "attention_scaling", None)
    # What else the name may find is not what graphs are compared by.
    if type(factor) not in (float, int) or inv_freq is not rotary._buffers.get("inv_freq"):
        return None
    if not is_plain_tensor(inv_freq, device, DTYPES) or inv_freq.ndim != 1:
        return None
    return Frequencies(inv_freq, float(factor))


def _is_matrix_product(forward: Any) -> bool | None:
    """Whether the forward of a class takes matrix products for angles; None if it has none of the known forms."""
    while hasattr(forward, "__wrapped__"):
        if not _is_known_decorator(forward):
            return None
        forward = forward.__wrapped__
    # Asked anew each time: editors that reload modules put other code into a function that is there.
    code = getattr(forward, "__code__", None)
    if not isinstance(code, CodeType) or not origin_of(forward).startswith("transformers.models."):
        return None
    return _forms().get(_without_places(code))


def _is_known_decorator(wrapper: Any) -> bool:
    """Whether it is a function that `torch.no_grad()`, or Transformers' decorator of rotary embeddings, has made."""
    origin = origin_of(wrapper)
    if origin != NO_GRAD:
        return origin == ROPE_UTILS
    held = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True))
    # Any context manager can decorate by way of the same function.
    factory = held["ctx_factory"].cell_contents if "ctx_factory" in held else None
    return type(getattr(factory, "__self__", None)) is torch.no_grad


@functools.cache
def _forms() -> dict[CodeType, bool]:
    """Whether a form takes matrix products, by its code."""
    return {_compiled(form): form is not PRODUCT for form in (PRODUCT, MATRIX_PRODUCT, WIDENED_FIRST)}


def _compiled(form: str) -> CodeType:
    # Python calls functions of what it sees imported in another way.
    module = compile(f"import torch\n{form}", "", "exec", dont_inherit=True)
    return next(_without_places(held) for held in module.co_consts if isinstance(held, CodeType))


def _without_places(code: CodeType) -> CodeType:
    """A function's code, equal to any that does the same in the same words, wherever it was written."""
    return code.replace(co_filename="", co_name="", co_qualname="", co_firstlineno=1, co_linetable=b"")


def _multiplies_in_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
