"""Dense keys and values with NaN in all that must not be read, and the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.dense.causal_layout import CausalLayout, layout_of
from hf_fastattn.dense.dense_attention import dense_attention
from hf_fastattn.interface import attention_mask


@dataclasses.dataclass
class Case:
    """Dense inputs with NaN in all that must not be read, and the same in fp64 without padding, row by row."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    starts: list[int]
    filled: int


def make_case(
    queries: int = 5, filled: int = 40, room: int = 3, window: int | None = None, groups: int = 2, layout: str = "BGLD"
) -> Case:
    """Rows with left padding of 0, 7 and all but two keys, and `room` keys that hold no token yet."""
    generator = torch.Generator().manual_seed(queries)
    starts = [0, 7, filled - 2]
    order = {"BGLD": (0, 1, 2, 3), "BLGD": (0, 2, 1, 3), "GBLD": (1, 0, 2, 3)}[layout]
    q = torch.randn(3, queries, 4, 16, generator=generator).transpose(1, 2)
    shape = [(3, groups, filled + room, 16)[i] for i in order]
    k, v = (torch.randn(shape, generator=generator).permute([order.index(i) for i in range(4)]) for _ in range(2))
    real = torch.arange(filled) >= torch.tensor(starts)[:, None]
    for tensor in (k, v):
        tensor[:, :, filled:] = math.nan
        tensor.transpose(1, 2)[:, :filled][~real] = math.nan
    config = type("Config", (), {"sliding_window": window})
    offset = filled - queries
    mask = attention_mask(3, queries, filled + room, q_offset=offset, attention_mask=real, local_size=window, config=config)
    assert mask is not None and layout_of(mask) is not None
    return Case(q, k, v, mask, starts, filled)


def oracle(case: Case, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """`[B, S, H, D]` in fp64 by the definition; zero for padding."""
    rows, heads, queries, dim = case.q.shape
    out = torch.zeros(rows, queries, heads, dim, dtype=torch.float64)
    ratio = heads // case.k.shape[1]
    for b, start in enumerate(case.starts):
        for i in range(queries):
            at = case.filled - queries + i
            lo = start if window is None else max(start, at - window + 1)
            for h in range(heads if at >= start else 0):
                scores = case.k[b, h // ratio, lo : at + 1].double() @ case.q[b, h, i].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                weights = scores.softmax(0)[: at + 1 - lo]
                out[b, i, h] = weights @ case.v[b, h // ratio, lo : at + 1].double()
    return out


def check_repeated(name: str, device: str, dtype: torch.dtype = torch.float32, rows: int = 3) -> None:
    """The second and the third layer of a forward compute what a first one would, with their own keys and values."""
    options = dict(OPTIONS[name])
    softcap, sinks = options.pop("softcap", None), options.pop("sinks", False)
    case = make_case(**options)
    layout = layout_of(case.mask)
    assert layout is not None
    scores = {"scale": 0.3, "softcap": softcap, "sinks": torch.randn(4).to(device) if sinks else None}

    def outputs(shared: bool) -> list[Tensor]:
        def seen() -> CausalLayout:
            room = (layout.padded, layout.filled, layout.kv_length, layout.window)
            return CausalLayout.of_starts(layout.starts[:rows].to(device), *room)

        one = seen()
        layers = [[(t[:rows] * factor).to(device, dtype) for t in (case.q, case.k, case.v)] for factor in (1.0, 0.5, -0.7)]
        found = [dense_attention(*layer, one if shared else seen(), backend="triton", **scores) for layer in layers]
        assert not shared or len(one.launches) == 1
        return found

    for ours, want in zip(outputs(True), outputs(False), strict=True):
        assert torch.equal(ours, want)
    assert not torch.equal(*outputs(True)[:2])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "one query": {"queries": 1},
    "one query, window, sinks": {"queries": 1, "window": 6, "sinks": True},
    "all queries": {"queries": 40, "window": 6},
    "all queries, long": {"queries": 90, "filled": 90, "window": 30},
    "few keys": {"queries": 3, "filled": 5, "room": 0},
    "tokens before heads": {"layout": "BLGD"},
    "heads before rows": {"layout": "GBLD"},
    "one key head": {"groups": 1},
    "other strides of the values": {"other": True},
}
