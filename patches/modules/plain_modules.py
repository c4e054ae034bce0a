"""Which modules do what their class does and nothing else, so that a kernel may do it instead of a call.

Anything else is called: modules with hooks (but accelerate's that move nothing), with a forward of their own, of another
class (LoRA, quantised, sharded), of a class whose forward was replaced, or with weights that are not plain dense tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from hf_fastattn.graphs.module_checks import CAPTURE_HOOK, is_compiled_module
from hf_fastattn.parallel.expert_shards import ExpertShard, expert_shard_of
from hf_fastattn.parallel.shards import COLUMNS, Shard, shard_of
from hf_fastattn.parallel.shared_heads import HEADS, with_whole_head
from hf_fastattn.wrappers import runs_class_forward

LIBRARIES = ("transformers.", "torch.nn.")
Dtypes = tuple[torch.dtype, ...]


@functools.lru_cache(maxsize=256)
def _is_library_class(kind: Any, forward: Callable[..., Any], name: str) -> bool:
    """Whether `kind` is called `name`, comes from a library, and `forward` is the one that it was defined with."""
    own = (kind.__module__, f"{name}.forward") == (forward.__module__, forward.__qualname__)
    return own and kind.__name__ == name and kind.__module__.startswith(LIBRARIES)


def _has_forward_of(module: nn.Module, name: str, device: torch.device) -> bool:
    kind: Any = type(module)
    return runs_class_forward(module, device) and _is_library_class(kind, kind.forward, name)


def is_plain(module: nn.Module, name: str, device: torch.device) -> bool:
    """Whether calling the module runs the forward of the library's class `name`, and nothing before or after it.

    Args:
        device: on which everything is that it is given.
    """
    return not module._forward_hooks and not module._forward_pre_hooks and _has_forward_of(module, name, device)


def is_plain_layer(module: nn.Module, name: str, device: torch.device) -> bool:
    """`is_plain`, but for the hooks that Transformers left where hidden states were asked for once."""
    return has_no_foreign_hooks(module) and _has_forward_of(module, name, device)


def has_no_foreign_hooks(module: nn.Module) -> bool:
    """Whether there are no hooks but those of Transformers, which do nothing unless outputs are recorded."""
    hooks = module._forward_hooks
    known = not hooks or all(getattr(hook, "__name__", "") == CAPTURE_HOOK for hook in hooks.values())
    return known and not module._forward_pre_hooks


def is_plain_tensor(tensor: Any, device: torch.device, dtypes: Dtypes) -> bool:
    """Whether it is a dense contiguous tensor of one of the dtypes on the device, and no subclass."""
    return (
        (type(tensor) is nn.Parameter or type(tensor) is Tensor)
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


def linear_parameters(module: nn.Module, device: torch.device, dtypes: Dtypes) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that calling is `x weight^T + bias` with plain tensors; None if it is anything else.

    Of a layer whose columns are spread over ranks they are this rank's.

    Args:
        dtypes: that the product takes: under autocast those that it would cast.
    """
    if type(module) is not nn.Linear:
        return None
    # Not by attribute, which costs the host half a microsecond each.
    held = module._parameters
    if "bias" not in held:
        return None
    weight: Tensor | None
    bias: Tensor | None
    if is_plain(module, "Linear", device):
        weight, bias = held.get("weight"), held["bias"]
    else:
        part = plain_shard(module)
        if part is None or part.kind not in (COLUMNS, HEADS):
            return None
        weight, bias = part.weight, part.bias
    if not is_plain_tensor(weight, device, dtypes):
        return None
    if bias is not None and not is_plain_tensor(bias, device, dtypes):
        return None
    assert weight is not None
    return weight, bias


def plain_shard(module: nn.Module) -> Shard | None:
    """This rank's part of a layer that is spread over ranks, if calling it does nothing but what its kind says.

    Of a projection whose heads ranks share it is the whole head, and calling the layer gives less: see `projected`.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    part = shard_of(module)
    return part if part is None or part.kind != COLUMNS else with_whole_head(module, part)


def projected(module: nn.Module, x: Tensor) -> Any:
    """What a projection of an attention gives, with the whole of a head that this rank shares with others."""
    part = plain_shard(module)
    return module(x) if part is None or part.kind != HEADS else functional.linear(x, part.weight, part.bias)


def plain_expert_shard(module: nn.Module, name: str) -> ExpertShard | None:
    """This rank's part of experts of the library's class `name`, if calling them does nothing but what the plan says."""
    kind: Any = type(module)
    if module._forward_hooks or module._forward_pre_hooks or not _is_library_class(kind, kind.forward, name):
        return None
    return expert_shard_of(module)


def norm_weight(module: nn.Module, name: str, device: torch.device, dtypes: Dtypes) -> Tensor | None:
    """The weight, of one of the dtypes, of a norm that calling is the RMSNorm of class `name`; None if it is not."""
    weight = module._parameters.get("weight")
    return weight if is_plain_tensor(weight, device, dtypes) and is_plain(module, name, device) else None


def is_silu(module: nn.Module | None, device: torch.device) -> bool:
    """Whether calling the module is SiLU; None stands for what is no module."""
    if module is None or type(module) not in (SiLUActivation, nn.SiLU):
        return False
    return is_plain(module, type(module).__name__, device)


def layers_of(decoder: Any) -> Iterator[Any]:
    """The decoder's layers, as many as its configuration says, without what torch.compile put around them."""
    # A slice of them would be a new module.
    return map(written_module, islice(decoder.layers, decoder.config.num_hidden_layers))


def written_module(module: Any) -> Any:
    """The module that torch.compile made this one from; itself if it did not, or if it has hooks of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return module._modules["_orig_mod"] if is_compiled_module(module) and not hooked else module


def norm_eps(norm: Any) -> float:
    """What an RMSNorm adds to the mean square, by whichever name its class has for it."""
    state = vars(norm)
    return state["variance_epsilon"] if "variance_epsilon" in state else norm.eps
