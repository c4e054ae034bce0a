"""`SharedHeads`: whole key heads on ranks that Transformers' plan gives parts of one, with fewer heads than ranks.

The plan cuts `k_proj` and `v_proj` into as many parts as there are ranks, whatever the heads. With `ranks / key heads` a
whole number, neighbours have parts of one head, and the query heads of each of them read that head alone: so each takes the
whole of it, and computes and stores its keys, as its neighbours do (replicated heads, as in vLLM and Megatron-LM). Modules
and weights stay as they are: the wholes lie beside them, and are gathered anew before each call, so that no change of the
weights between calls, however it was made, is missed.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_fastattn.parallel.all_reduce import all_gather
from hf_fastattn.parallel.shards import COLUMNS, Shard, shard_of

# Of a head that several ranks share each holds the whole; calling the layer gives but a part of it.
HEADS = "heads"
SHARED = ("k_proj", "v_proj")


class _Whole(NamedTuple):
    """What a rank holds of a projection beside its part: `[D, K]` of its key head, and `[D]`."""

    weight: Tensor
    bias: Tensor | None


# By the projection; of patched models alone.
_wholes: weakref.WeakKeyDictionary[nn.Module, _Whole] = weakref.WeakKeyDictionary()


def with_whole_head(module: nn.Module, part: Shard) -> Shard:
    """This rank's part of a projection; or the key head that its queries read, of kind `HEADS`, if the part is less."""
    held = _wholes.get(module) if _wholes else None
    return part if held is None else part._replace(kind=HEADS, weight=held.weight, bias=held.bias)


def shared_by(attention: nn.Module) -> int:
    """How many ranks have a part of each key head; 1 if heads are not cut, or not so that each rank's queries read one.

    Args:
        attention: with projections that are spread over ranks.
    """
    dim: Any = attention.head_dim
    linears: list[Any] = [attention._modules[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    q, k, v, o = linears
    part = shard_of(k)
    if part is None or part.kind != COLUMNS or k.out_features % dim:
        return 1
    ranks, heads = part.group.size(), k.out_features // dim
    # Beside the queries of a head there may be its gate.
    queries, width = o.in_features // dim, q.out_features // o.in_features
    whole = not ranks % heads and not queries % ranks and not queries % heads and not k.out_features % ranks
    fits = whole and v.out_features == k.out_features and q.out_features == queries * dim * width
    sizes = (q.out_features, k.out_features, v.out_features)
    for linear, size in zip(linears, sizes, strict=False):
        shard = shard_of(linear)
        fits &= shard is not None and shard.weight.shape[0] * ranks == size
    return ranks // heads if fits else 1


class SharedHeads:
    """The whole key heads of one model on this rank.

    Args:
        attentions: whose key heads several ranks share.
    """

    def __init__(self, attentions: list[nn.Module]) -> None:
        self._attentions = attentions

    @staticmethod
    def of(model: nn.Module) -> SharedHeads | None:
        """Those of an understood model; None if no head is shared."""
        found = [
            module
            for module in model.modules()
            if isinstance(getattr(module, "head_dim", None), int)
            and {"q_proj", "o_proj", *SHARED} <= module._modules.keys()
            and shared_by(module) > 1
        ]
        return SharedHeads(found) if found else None

    def refresh(self) -> None:
        """Gather the heads from the weights as they are; every rank does so at the same time."""
        with torch.inference_mode(False), torch.no_grad():
            for attention in self._attentions:
                sharers = shared_by(attention)
                for name in SHARED:
                    linear: Any = attention._modules[name]
                    part = shard_of(linear)
                    if part is None or sharers == 1:
                        # It was changed since, and is not understood any more.
                        _wholes.pop(linear, None)
                        continue
                    held = _wholes.get(linear)
                    _wholes[linear] = _Whole(
                        _gathered(part.weight, sharers, part.group, None if held is None else held.weight),
                        None if part.bias is None
                        else _gathered(part.bias, sharers, part.group, None if held is None else held.bias),
                    )  # fmt: skip

    def drop(self) -> None:
        """Hold no memory, as when the model is unpatched."""
        for attention in self._attentions:
            for name in SHARED:
                linear: Any = attention._modules[name]
                _wholes.pop(linear, None)


def _gathered(part: Tensor, sharers: int, group: Any, held: Tensor | None) -> Tensor:
    """The parts of this rank and of those it shares a head with, one behind the other; in `held` if that fits."""
    parts = part.new_empty(group.size(), *part.shape)
    all_gather(parts.view(-1, *part.shape[1:]), part.contiguous(), group)
    first = dist.get_rank(group) // sharers * sharers
    whole = parts[first : first + sharers].flatten(0, 1)
    fits = held is not None and (held.shape, held.dtype, held.device) == (whole.shape, whole.dtype, whole.device)
    # Graphs read the head where it was.
    return held.copy_(whole) if fits and held is not None else whole.clone()
