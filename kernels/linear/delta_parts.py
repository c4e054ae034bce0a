"""What a layer of Gated DeltaNet gives its kernels: projections, weights, and where the states of its rows lie.

Shape letters of its own: HK key heads, HV = HK * R value heads, of which R neighbours share the queries and keys of a key
head; DK and DV their dimensions; K the length of the causal convolution, C = 2 HK DK + HV DV its channels: those of all
queries, then keys, then values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaInputs(NamedTuple):
    """What the projections give for T tokens; views of any strides, but contiguous in the last dimension of q, k, v and z.

    Attributes:
        q: `[T, HK, DK]` queries, before the convolution; `k` likewise.
        v: `[T, HK, R, DV]` values, before the convolution.
        z: `[T, HK, R, DV]` of the output gate.
        b: `[T, HK, R]`, whose sigmoid is the share of the old value that is overwritten.
        a: `[T, HK, R]`, which decides how much is forgotten.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor

    @property
    def channels(self) -> Tensor:
        """`[T, C]`, what the convolution takes."""
        return torch.cat((self.q.flatten(1), self.k.flatten(1), self.v.flatten(1)), 1)


class DeltaWeights(NamedTuple):
    """The layer's weights.

    Attributes:
        conv: `[C, K]`, the newest token's last.
        a_log: `[HV]`; `dt_bias` likewise.
        norm: `[DV]` of the gated RMSNorm, which adds `eps` to the mean square.
    """

    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


class StepStates(NamedTuple):
    """Where the states of the rows of a decode step lie, and where those after it go.

    In place (`seq_lens` is given, and both places are the same) a row's last inputs of the convolution are a ring: that of
    the token with number n (from 0) lies at `(n + 1) % K`. Else they are in order, the newest last, as in Transformers.

    Attributes:
        conv: `[N, C, K]` last inputs of the convolution.
        recurrent: `[N, HV, DK, DV]` fp32.
        slots: `[T]` int32, which of the N a row has; -1 for rows that take no part.
        conv_out: likewise, after the step; `recurrent_out` and `slots_out` as well.
        seq_lens: `[T]` int32, tokens of each row with the new one.
    """

    conv: Tensor
    recurrent: Tensor
    slots: Tensor
    conv_out: Tensor
    recurrent_out: Tensor
    slots_out: Tensor
    seq_lens: Tensor | None = None
