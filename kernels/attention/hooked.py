"""Where the attention kernels call a variant's functions. `HOOKS` is a `variants.hooks.Hooks`; without functions nothing is
compiled in.

`b` is the row of the batch, a number or a block that broadcasts to `[M, N]`; `h: [M]` are the query heads and `q_idx: [M]`
the positions of the packed queries, `tensors` the pointers that the functions read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.rotated import MOST_TURNED, query_of_runs, rotated_query
from hf_fastattn.kernels.launch import LOG2E as LOG2E_FLOAT

LOG2E = tl.constexpr(LOG2E_FLOAT)


@triton.jit
def hooked_query(q, h, q_idx, tensors, HOOKS: tl.constexpr, q_ptr, ok_m, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """`q: [M, BLOCK_D]` after the query transform, which computes in fp32.

    Where RoPE is inside, `rotated.query_of_runs` for few queries and runs no shorter than tiles, else
    `rotated.rotated_query`.
    `q_ptr: [M]` is where each of them lies, if it is `ok_m`.
    """
    if HOOKS.rotated > 0 and HOOKS.run >= BLOCK_N and q.shape[0] <= MOST_TURNED:
        turned = query_of_runs(q, q_ptr, ok_m, q_idx, tensors[HOOKS.rotation_table], HOOKS, D)
    elif HOOKS.rotated > 0:
        turned = rotated_query(q_ptr, ok_m, q_idx, tensors[HOOKS.rotation_table], HOOKS, D)
    elif HOOKS.query_transform is not None:
        turned = HOOKS.query_transform(q.to(tl.float32), h[:, None], q_idx[:, None], tensors).to(q.dtype)
    else:
        turned = q
    return turned


@triton.jit
def hooked_keys(k, kv_head, key_n, tensors, HOOKS: tl.constexpr):
    """`k: [N, BLOCK_D]` after the key transform, which computes in fp32."""
    if HOOKS.key_transform is not None:
        k = HOOKS.key_transform(k.to(tl.float32), kv_head, key_n[:, None], tensors).to(k.dtype)
    return k


@triton.jit
def hooked_scores(scores, scale, b, h, q_idx, key_n, tensors, HOOKS: tl.constexpr):
    """Raw scores `[M, N]` scaled and after the variant's score function; without one as they are."""
    if HOOKS.score_mod is not None:
        scores = HOOKS.score_mod(scores * scale, b, h[:, None], q_idx[:, None], key_n[None, :], tensors)
    return scores


@triton.jit
def hooked_mask(scores, b, h, q_idx, key_n, tensors, HOOKS: tl.constexpr):
    """Scores `[M, N]`, -inf where the variant's mask hides the key."""
    if HOOKS.mask_mod is not None:
        seen = HOOKS.mask_mod(b, h[:, None], q_idx[:, None], key_n[None, :], tensors)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def sigmoid_weights(scores, factor):
    """The sigmoid of scores `[M, N]` times `factor`, in base 2."""
    return 1.0 / (1.0 + tl.math.exp2(-(scores * factor)))


@triton.jit
def sigmoid_step(scores, v, row_sum, acc, factor, PRECISION: tl.constexpr):
    """As `tile.softmax_step`, with weights `sigmoid(score)`, which are added up as they are: the maximum stays 0."""
    weights = sigmoid_weights(scores, factor)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return tl.zeros_like(row_sum), row_sum + tl.sum(weights, 1), acc


@triton.jit
def hooked_sink(row_max, row_sum, acc, h, tensors, HOOKS: tl.constexpr):
    """The state with the sinks of the heads `h: [M]` in the sum."""
    if HOOKS.sink is not None:
        sink = HOOKS.sink(h, tensors) * LOG2E
        new_max = tl.maximum(row_max, sink)
        # Without this, a sink of -inf and no key would give -inf - -inf = NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.math.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.math.exp2(sink - shift)
        acc = acc * decay[:, None]
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def hooked_output(out, acc, h, q_idx, tensors, HOOKS: tl.constexpr):
    """`out: [M, BLOCK_D]` after the output transform; of sigmoid attention the sum `acc` itself."""
    if HOOKS.sigmoid:
        out = acc
    if HOOKS.output_transform is not None:
        out = HOOKS.output_transform(out, h[:, None], q_idx[:, None], tensors)
    return out
