"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025) in plain PyTorch, token by token and by chunks.

With q and k normalised, a decay `alpha = exp(g)` and a share `beta` a token and value head, the state S `[DK, DV]` becomes

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(DK)

Around it: a causal convolution with SiLU over q, k and v, and an RMSNorm whose output is multiplied by `silu(z)`. Where
Transformers rounds to the dtype of the model, so does this; fp64 inputs give the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights, StepStates

CHUNK = 64
# Added to the square sums of q and k.
NORM_EPS = 1e-6


class Gated(NamedTuple):
    """What the rule takes, fp32 or wider: q (scaled) and k `[.., HV, DK]`, v `[.., HV, DV]`, g and beta `[.., HV]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def delta_step(x: DeltaInputs, weights: DeltaWeights, states: StepStates) -> Tensor:
    """One token a row: `[T, HV * DV]`, zero for rows that take no part; writes the states after it."""
    rows = (states.slots >= 0).nonzero()[:, 0]
    out = x.v.new_zeros(x.v.shape[0], x.v[0].numel())
    if not rows.numel():
        return out
    x = DeltaInputs(*(part[rows] for part in x))
    read, write = states.slots[rows].long(), states.slots_out[rows].long()
    before, after = _places(states, rows)
    conv = states.conv[read].gather(2, before)
    out[rows], conv, states.recurrent_out[write] = delta_update(x, weights, conv, states.recurrent[read])
    # Advanced indexing copies: written through it, the other rows stay.
    states.conv_out[write] = torch.empty_like(conv).scatter_(2, after, conv)
    return out


def delta_update(x: DeltaInputs, weights: DeltaWeights, conv: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token of each of B rows, whose states are `conv [B, C, K]`, oldest input first, and `recurrent [B, HV, DK, DV]`.

    Returns:
        `[B, HV * DV]`, and both states after it.
    """
    conv = torch.cat((conv[..., 1:], x.channels[..., None]), -1)
    taken = gated(x, weights, convolved(conv, weights.conv)[..., 0])
    state, k = recurrent * taken.g.exp()[..., None, None], taken.k
    held = (state * k[..., None]).sum(-2)
    change = (taken.v - held) * taken.beta[..., None]
    state += k[..., None] * change[..., None, :]
    read_out = (state * taken.q[..., None]).sum(-2).to(x.v.dtype)
    return gated_norm(read_out, x.z.flatten(1, 2), weights).flatten(1), conv, state


def _places(states: StepStates, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, C, K]`: places of the inputs of the convolution, oldest first, before the step and after it."""
    channels, size = states.conv.shape[1:]
    order = torch.arange(size, device=rows.device)
    before = after = order.expand(len(rows), -1)
    if states.seq_lens is not None:
        newest = states.seq_lens[rows].long()[:, None]
        before, after = (newest + order) % size, (newest + 1 + order) % size
    return before[:, None].expand(-1, channels, -1), after[:, None].expand(-1, channels, -1)


def delta_prefill(
    x: DeltaInputs,
    weights: DeltaWeights,
    lengths: Sequence[int],
    conv: Tensor | None = None,
    recurrent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several tokens a row, packed.

    Args:
        lengths: of the B rows, T in all.
        conv: `[B, C, K]` last inputs of the convolution, oldest first; none so far by default.
        recurrent: `[B, HV, DK, DV]` states; zero by default.

    Returns:
        `[T, HV * DV]`, and both states after the last token of each row.
    """
    rows, size, device = len(lengths), weights.conv.shape[1], x.q.device
    counts = torch.tensor(lengths, device=device)
    there = torch.arange(max(lengths), device=device) < counts[:, None]
    channels = x.channels
    if conv is None:
        conv = channels.new_zeros(rows, channels.shape[1], size)
    # Right of its tokens a row is padded with what changes no state: nothing is forgotten, and nothing written.
    new = channels.new_zeros(*there.shape, channels.shape[1])
    new[there] = channels
    everything = torch.cat((conv, new.transpose(1, 2)), 2)
    mixed = convolved(everything[:, :, 1:], weights.conv).transpose(1, 2)
    last = (counts[:, None] + torch.arange(size, device=device))[:, None].expand(-1, channels.shape[1], -1)
    taken = gated(x, weights, mixed[there])
    parts = Gated(*(_padded(part, there) for part in taken))
    if recurrent is None:
        recurrent = taken.v.new_zeros(rows, taken.v.shape[1], taken.k.shape[-1], taken.v.shape[-1])
    read_out, recurrent = by_chunks(parts, recurrent)
    out = gated_norm(read_out[there].to(x.v.dtype), x.z.flatten(1, 2), weights)
    return out.flatten(1), everything.gather(2, last), recurrent


def _padded(part: Tensor, there: Tensor) -> Tensor:
    padded = part.new_zeros(*there.shape, *part.shape[1:])
    padded[there] = part
    return padded


def convolved(inputs: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the convolution of `[B, C, K - 1 + L]`: `[B, C, L]`."""
    return functional.silu(functional.conv1d(inputs, weight[:, None], groups=weight.shape[0]))


def gated(x: DeltaInputs, weights: DeltaWeights, mixed: Tensor) -> Gated:
    """What the rule takes, `[T, HV, ..]`, of the convolution's output `[T, C]`."""
    tokens, heads, shared, dim = x.v.shape
    width = heads * x.q.shape[-1]
    q, k, v = (part.unflatten(1, (-1, dim)) for dim, part in _split(mixed, width, x))
    wide = torch.float64 if v.dtype is torch.float64 else torch.float32
    q, k = (_normalised(part.to(wide)).repeat_interleave(shared, 1) for part in (q, k))
    b, a = x.b.reshape(tokens, -1), x.a.reshape(tokens, -1)
    g = -weights.a_log.to(wide).exp() * functional.softplus(a.to(wide) + weights.dt_bias)
    return Gated(q * q.shape[-1] ** -0.5, k, v.to(wide), g, b.sigmoid().to(wide))


def _split(mixed: Tensor, width: int, x: DeltaInputs) -> list[tuple[int, Tensor]]:
    dims = (x.q.shape[-1], x.q.shape[-1], x.v.shape[-1])
    return list(zip(dims, mixed.split((width, width, mixed.shape[1] - 2 * width), 1), strict=True))


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def gated_norm(x: Tensor, z: Tensor, weights: DeltaWeights) -> Tensor:
    """`silu(z) * RMSNorm(x)`, in the dtype of x."""
    wide = x if x.dtype is torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + weights.eps)
    return ((weights.norm * wide.to(x.dtype)) * functional.silu(z.to(wide.dtype))).to(x.dtype)


def by_chunks(x: Gated, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule over `[B, L, HV, ..]`, chunk by chunk: outputs `[B, L, HV, DV]` and the states after it.

    Inside a chunk, with G the running sum of g, all changes that its tokens make to the state are
    `U - W S_0`, where `(I + A) U = beta V`, `(I + A) W = beta exp(G) K` and, for j < i,
    `A_ij = beta_i k_i.k_j exp(G_i - G_j)`: the WY representation.
    """
    length = x.g.shape[1]
    q, k, v, g, beta = (_in_chunks(part) for part in x)
    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    system = (k * beta[..., None]) @ k.transpose(-1, -2) * decay
    changes, weights = (
        torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        for right in (v * beta[..., None], k * (beta * total.exp())[..., None])
    )
    scores = q @ k.transpose(-1, -2) * decay
    # Of what the chunk began with, and what each change has become at its end.
    q, k = q * total.exp()[..., None], k * (total[..., -1:] - total).exp()[..., None]
    outs = []
    for chunk in range(g.shape[2]):
        change = changes[:, :, chunk] - weights[:, :, chunk] @ state
        outs.append(q[:, :, chunk] @ state + scores[:, :, chunk] @ change)
        state = state * total[:, :, chunk, -1].exp()[..., None, None] + k[:, :, chunk].transpose(-1, -2) @ change
    return torch.cat(outs, 2)[:, :, :length].transpose(1, 2), state


def _in_chunks(part: Tensor) -> Tensor:
    """`[B, L, HV, ..]` as `[B, HV, chunks, CHUNK, ..]`, padded with zeros."""
    part = part.transpose(1, 2)
    missing = -part.shape[2] % CHUNK
    part = functional.pad(part, (*[0] * (2 * (part.ndim - 3)), 0, missing))
    return part.unflatten(2, (-1, CHUNK))
