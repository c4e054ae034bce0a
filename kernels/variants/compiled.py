"""A `Variant` for the Triton kernels: its hooks as `@triton.jit` functions of a generated module in Triton's cache.

Triton compiles functions from source files. The file is named by the hash of its text, so that another process finds both
it and the kernels compiled with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from hf_fastattn.kernels.variants.hooks import HOOKS, CompiledVariant, Hooks
from hf_fastattn.kernels.variants.trace import VariantError, trace
from hf_fastattn.kernels.variants.translate import all_translatable, translatable, translate, translate_parts
from hf_fastattn.kernels.variants.variant import BuiltInScore, Variant, is_triton, parameters_of, rotation_of

HEADER = """import triton
import triton.language as tl

from hf_fastattn.kernels.variants import device_functions as dev
"""


def compile_variant(variant: Variant, head_dim: int, device: torch.device) -> CompiledVariant:
    """The functions of `variant`, translated and ready to be inlined into the attention kernels.

    Args:
        head_dim: of the model's heads.
        device: of the queries; what the functions read has to be there too.

    Raises:
        VariantError: a function cannot be translated; which operation, in which line, and what would work.
    """
    tensors: list[Tensor] = []
    texts: list[str] = []
    given: dict[str, Any] = {}
    factor = 1.0
    reads_row = mask_by_head = False
    functions, rotation = variant.functions(), rotation_of(variant)
    if rotation is not None:
        del functions["query_transform"], functions["key_transform"]
    for hook, function in functions.items():
        if isinstance(function, BuiltInScore) and function.softcap is not None:
            function = dataclasses.replace(function, divided=True)
        if is_triton(function):
            given[hook] = function
            texts.append(_wrapper(hook, function, variant, tensors))
            reads_row |= "b" in HOOKS[hook]
            mask_by_head |= hook == "mask_mod"
            continue
        traced = trace(hook, function, head_dim, device)
        if not all_translatable(traced):
            # Most functions need none, and to collect how PyTorch writes operations takes longer than all else here.
            traced = trace(hook, function, head_dim, device, decompositions())
        reads_row |= traced.reads_row
        mask_by_head |= hook == "mask_mod" and traced.reads("h")
        number_of = functools.partial(_number_of, tensors)
        texts.append(translate(traced, number_of, head_dim))
        if hook == "score_mod":
            more, factor = translate_parts(traced, number_of, head_dim)
            texts[-1] += "\n\n" * bool(more) + more
    reading = tuple(hook for hook, text in zip(functions, texts, strict=True) if "tensors[" in text)
    text = "\n\n".join([HEADER, *texts])
    inside: dict[str, Any] = {}
    if rotation is not None:
        if rotation.table.device.type != device.type:
            raise VariantError(f"RoPE inside reads a table on {rotation.table.device}, but the model is on {device}")
        inside |= rotation.blocks(head_dim)
        inside |= {"rotation_factor": rotation.factor**2, "rotation_table": _number_of(tensors, rotation.table)}
        inside["run"] = rotation.run
    hooks = _hooks(text, given, variant, factor)._replace(**inside)
    to_16_bits = text.replace("dev.tanh(", "dev.tanh_to_16_bits(")
    hooks_16_bits = hooks if to_16_bits == text else _hooks(to_16_bits, given, variant, factor)._replace(**inside)
    own = [getattr(function, "cache_key", repr(function)) for function in given.values()]
    identity = _hash(f"{text}{own}{hooks.sigmoid}{hooks.causal}{variant.window}{variant.rope}{inside}")
    found = (hooks, tuple(tensors) or None, variant.window, reads_row, identity, mask_by_head, reading, hooks_16_bits)
    return CompiledVariant(*found)


def _hooks(text: str, given: dict[str, Any], variant: Variant, last_factor: float) -> Hooks:
    module = _module(text, tuple(given.items()))
    functions: dict[str, Any] = {hook: getattr(module, hook, None) for hook in (*HOOKS, "score_by_distance", "score_rest")}
    factor = 1.0 if variant.softcap is None else 1.0 / variant.softcap
    sigmoid = variant.normalizer == "sigmoid"
    return Hooks(**functions, sigmoid=sigmoid, causal=variant.causal, factor=factor, last_factor=last_factor)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """How PyTorch writes operations that have no translation of their own as others."""
    aten = torch.ops.aten
    more = get_decompositions([aten._softmax, aten._log_softmax, aten.softplus, aten.mv])
    every: dict[Any, Callable[..., Any]] = {**core_aten_decompositions(), **more}
    return {op: function for op, function in every.items() if not translatable(op._schema.name.split("::")[1])}


def _number_of(tensors: list[Tensor], tensor: Tensor) -> int:
    for number, known in enumerate(tensors):
        if known is tensor:
            return number
    tensors.append(tensor)
    return len(tensors) - 1


def _wrapper(hook: str, function: Any, variant: Variant, tensors: list[Tensor]) -> str:
    """A function with the arguments that kernels give, which calls a user's own with its parameters."""
    values = [variant.parameters[name] for name in parameters_of(hook, function, variant.parameters)]
    extra = [f"tensors[{_number_of(tensors, v)}]" if isinstance(v, Tensor) else repr(v) for v in values]
    own = ", ".join(HOOKS[hook])
    return f"@triton.jit\ndef {hook}({own}, tensors):\n    return given_{hook}({', '.join([own, *extra])})\n"


@functools.cache
def _module(text: str, given: tuple[tuple[str, Any], ...]) -> ModuleType:
    """The module of this text, imported; in it `given_<hook>` are the user's own Triton functions."""
    name = f"variant_{_hash(text)}"
    path = _written(Path(triton.knobs.cache.dir) / "hf_fastattn", f"{name}.py", text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for hook, function in given:
        setattr(module, f"given_{hook}", function)
    # Triton looks for a function's globals in its module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _written(folder: Path, name: str, text: str) -> Path:
    """The file, whole for whoever reads it: several processes may write it at once."""
    path = folder / name
    if not path.exists() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    return path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
