"""Launches of every kernel by its own launcher, on CPU tensors: what `compile_cases` compiles."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_fastattn.eval.kernel_speed.page_by_page import page_by_page
from hf_fastattn.kernels.attention.append import rope_append
from hf_fastattn.kernels.attention.configs import short_row_tile
from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.merge import merge_states
from hf_fastattn.kernels.attention.new_token import NewToken
from hf_fastattn.kernels.attention.paged import visited_tiles
from hf_fastattn.kernels.attention.prefill import paged_prefill
from hf_fastattn.kernels.attention.rope_tables import rope_tables
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.short_row import short_row
from hf_fastattn.kernels.attention.widened_pages import widened_pages
from hf_fastattn.kernels.attention.work_list import work_list
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.experts import router
from hf_fastattn.kernels.experts.mixture import mixture
from hf_fastattn.kernels.layer import weight_sum
from hf_fastattn.kernels.layer.activation import silu_and_mul
from hf_fastattn.kernels.layer.configs import HOPPER, ProductTile, one_wave_tile
from hf_fastattn.kernels.layer.few_rows import few_rows
from hf_fastattn.kernels.layer.few_rows_configs import few_rows_tile
from hf_fastattn.kernels.layer.lora import Adapter, Members
from hf_fastattn.kernels.layer.matvec import gate_up_silu, matvec
from hf_fastattn.kernels.layer.norm import add_rms_norm
from hf_fastattn.kernels.layer.one_wave import one_wave
from hf_fastattn.kernels.layer.pushed_norm import pushed_norm
from hf_fastattn.kernels.layer.summed_norm import summed_norm
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, DeltaWeights, StepStates
from hf_fastattn.kernels.linear.delta_prefill import delta_prefill
from hf_fastattn.kernels.linear.delta_step import delta_step
from hf_fastattn.kernels.page_formats import KV_DTYPES, page_bytes, page_views
from hf_fastattn.kernels.quantised import products as quantised_products
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.kernels.sampling.continuations import continuations
from hf_fastattn.kernels.sampling.draw import sample_tokens
from hf_fastattn.kernels.sampling.fork import ForkTensors, fork
from hf_fastattn.kernels.sampling.greedy import greedy_tokens
from hf_fastattn.kernels.sampling.logprobs import token_logprobs
from hf_fastattn.kernels.sampling.loop_tensors import MOST_ENDS, LoopTensors
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.kernels.sampling.penalty import process_logits
from hf_fastattn.kernels.sampling.slide import slide
from hf_fastattn.kernels.sampling.typical import typical_scores
from hf_fastattn.kernels.variants import built_in
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.hooks import CompiledVariant
from hf_fastattn.kernels.variants.rotation import RotaryFrequencies
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.quantised.weight_cases import of_kind
from tests.kernels.variants import mods

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def pages(groups: int, dim: int, page: int, dtype: torch.dtype, kv_dtype: str | None = None) -> tuple[Any, Any]:
    if kv_dtype is not None:
        raw = torch.zeros(4, page_bytes(page, groups, dim), dtype=torch.uint8)
        return page_views(raw, page, groups, dim, KV_DTYPES[kv_dtype])
    return torch.zeros(4, page, groups, dim, dtype=dtype), torch.zeros(4, page, groups, dim, dtype=dtype)


def new_heads(rows: int, dim: int, dtype: torch.dtype, rotary: int | None, norm: bool, groups: int = 8) -> tuple[Any, ...]:
    weight = torch.ones(dim, dtype=dtype) if norm else None
    return torch.zeros(rows, groups, dim, dtype=dtype), torch.zeros(rows, rotary or dim, dtype=dtype), weight


def append(
    heads: int, groups: int, dim: int, *, tokens: int = 1, rotary: int | None = None, norm: bool = False,
    kv_dtype: str | None = None,
) -> object:  # fmt: skip
    q, slots = torch.zeros(tokens, heads, dim, dtype=BF16), torch.zeros(tokens, dtype=torch.int64)
    k, cos, weight = new_heads(tokens, dim, BF16, rotary, norm, groups)
    return rope_append(q, k, k, cos, cos, *pages(groups, dim, 16, BF16, kv_dtype), slots, q_norm=weight, k_norm=weight)


def table(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, columns, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)


def decode(
    ratio: int, dim: int, dtype: torch.dtype = BF16, *,
    page: int = 16, rows: int = 8, columns: int = 16, tokens: int = 1, processors: int = 1, listed: bool = False,
    kv_dtype: str | None = None, appends: bool = False, norm: bool = False, rotary: int | None = None, **options: Any,
) -> object:  # fmt: skip
    q = torch.zeros(rows * tokens, 8 * ratio, dim, dtype=dtype)
    workspace = Workspace(q.device)
    workspace.processors = processors
    if tokens > 1:
        options |= {"cu_seqlens_q": torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32), "max_query_len": tokens}
    held, batch = pages(8, dim, page, dtype, kv_dtype), table(rows, columns)
    if appends:
        k, cos, weight = new_heads(rows, dim, dtype, rotary, norm)
        options["new"] = NewToken(k, k, cos, cos, batch[1], weight, weight, settled=True)
    if listed:
        options["visited"] = visited_tiles(
            q, held[0], batch[0], None, batch[1], max_query_len=1, workspace=workspace, variant=options["variant"]
        )
    return paged_decode(q, *held, *batch, scale=1.0, workspace=workspace, **options)


def short(
    ratio: int, dim: int, dtype: torch.dtype = BF16, *, rotary: int | None = None, norm: bool = False,
    window: int | None = None, rows: int = 1,
) -> object:  # fmt: skip
    groups, workspace = 8, Workspace(torch.device("cpu"))
    workspace.processors = 132
    q, (k, cos, weight) = torch.zeros(rows, groups * ratio, dim, dtype=dtype), new_heads(rows, dim, dtype, rotary, norm)
    # On every architecture that of Hopper.
    tile = short_row_tile(HOPPER, q.element_size(), dim, groups)
    page_table, lengths = table(rows, 16)
    return short_row(
        q, k, k, cos, cos, *pages(groups, dim, 16, dtype), lengths, page_table, lengths, scale=1.0, window=window,
        workspace=workspace, keys_settled=True, q_norm=weight, k_norm=weight, tile=tile,
    )  # fmt: skip


def angles(half: int, dtype: torch.dtype = BF16) -> object:
    return rope_tables(torch.ones(half), torch.zeros(1, 1, dtype=torch.int64), 1.0, dtype)


def shared_prefix(
    ratio: int, dim: int, dtype: torch.dtype = BF16, *,
    page: int = 16, rows: int = 64, columns: int = 16, groups: int = 1, most: int = 16, processors: int = 132,
    levels: int = 1, kv_dtype: str | None = None, **options: Any,
) -> object:  # fmt: skip
    q, (page_table, lengths) = torch.zeros(rows, 8 * ratio, dim, dtype=dtype), table(rows, columns)
    begins, prefixes = (torch.zeros(levels, count, dtype=torch.int32) for count in (groups + 1, groups))
    workspace = Workspace(q.device)
    workspace.processors = processors
    return paged_decode_shared(
        q, *pages(8, dim, page, dtype, kv_dtype), page_table, lengths, begins, prefixes,
        max_group_rows=most, scale=1.0, workspace=workspace, **options,
    )  # fmt: skip


def paged_peer(ratio: int, dim: int, *, page: int = 16, rows: int = 8) -> object:
    q, batch = torch.zeros(rows, 8 * ratio, dim, dtype=BF16), table(rows, 16)
    return page_by_page(q, *pages(8, dim, page, BF16), *batch, scale=1.0)


def prefill(
    ratio: int, dim: int, dtype: torch.dtype = BF16, *,
    page: int = 16, tokens: int = 512, rows: int = 1, columns: int = 16, listed: bool = False,
    kv_dtype: str | None = None, **options: Any,
) -> object:  # fmt: skip
    q, (page_table, lengths) = torch.zeros(tokens, 8 * ratio, dim, dtype=dtype), table(rows, columns)
    begins, held = torch.linspace(0, tokens, rows + 1).to(torch.int32), pages(8, dim, page, dtype, kv_dtype)
    if listed:
        given = {"max_query_len": tokens, "workspace": Workspace(q.device), "variant": options["variant"]}
        options["visited"] = visited_tiles(q, held[0], page_table, begins, lengths, **given)
    return paged_prefill(q, *held, page_table, begins, lengths, scale=1.0, **options)


def widened(kv_dtype: str) -> object:
    return widened_pages(*pages(8, 128, 16, BF16, kv_dtype), *table(2, 16), BF16)


def varied(dim: int = 128, **fields: Any) -> CompiledVariant:
    """A variant with functions of `tests.kernels.variants.mods`, by name."""
    functions = {name: getattr(mods, value) if name.endswith("_mod") else value for name, value in fields.items()}
    return compile_variant(Variant(**functions), dim, torch.device("cpu"))


def inside(dim: int = 128, width: int | None = None, run: int = 128) -> CompiledVariant:
    """RoPE inside attention, of so many elements of a head."""
    variant = Variant(rope="inside").rotated_by(RotaryFrequencies.of(torch.ones((width or dim) // 2), run=run))
    return compile_variant(variant, dim, torch.device("cpu"))


def dilated() -> CompiledVariant:
    """A window of 512 keys, every fourth."""
    return compile_variant(built_in.dilated(4, 512), 128, torch.device("cpu"))


COS, SIN = torch.ones(2, 4096, 128)


def rope(x: torch.Tensor, h: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * COS[position] + torch.cat((-x[half:], x[:half])) * SIN[position]


def merge(dim: int, dtype: torch.dtype, tokens: int = 8) -> object:
    out, lse = torch.zeros(tokens, 4, dim, dtype=dtype), torch.zeros(tokens, 4)
    return merge_states(out, lse, out, lse)


def hopper(ratio: int, dim: int, *, page: int = 16, listed: bool = False, **options: Any) -> object:
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

    q, (page_table, lengths) = torch.zeros(512, 8 * ratio, dim, dtype=BF16), table(1, 16)
    begins, held = torch.tensor([0, 512], dtype=torch.int32), pages(8, dim, page, BF16)
    if listed:
        workspace = Workspace(q.device)
        options["visited"] = visited_tiles(
            q, held[0], page_table, begins, lengths, max_query_len=512, workspace=workspace, hopper=True, **options
        )
    return hopper_prefill(q, *held, page_table, begins, lengths, scale=1.0, processors=132, **options)


def add_norm(
    hidden: int, dtype: torch.dtype = BF16, *, tokens: int = 1, stream: torch.dtype | None = None, parts: int = 1
) -> object:
    x, residual = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(tokens, hidden, dtype=stream or dtype)
    other = x if parts == 2 else None
    return add_rms_norm(x, residual, residual[0], 1e-5, weights_settled=True, dtype=dtype, other=other)


def summed(hidden: int, dtype: torch.dtype = BF16, *, tokens: int = 1, ranks: int = 2) -> object:
    x, addresses = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(ranks, dtype=torch.int64)
    counts = torch.zeros(tokens, dtype=torch.int32)
    return summed_norm(x, addresses, addresses, counts, counts, 0, x, x[0], 1e-5)


def pushed(hidden: int, dtype: torch.dtype = BF16, *, tokens: int = 1, ranks: int = 2) -> object:
    x, addresses = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(ranks, dtype=torch.int64)
    counts = torch.zeros(tokens, dtype=torch.int32)
    return pushed_norm(x, addresses, tokens, counts, counts, 0, x, x[0], 1e-5)


def weights_summed() -> object:
    weights = [torch.zeros(70_000, dtype=BF16), torch.zeros(12, dtype=FP32)]
    table = weight_sum.table_of(weights, torch.device("cpu"))
    return weight_sum.weight_sum(table, torch.empty(weight_sum.PROGRAMS, dtype=torch.int64))


def activation(tokens: int = 1, width: int = 14336) -> object:
    gate, up = torch.zeros(tokens, 2 * width, dtype=BF16).chunk(2, -1)
    return silu_and_mul(gate, up)


def product(
    tokens: int, k: int, counts: tuple[int, ...], dtype: torch.dtype = BF16, *,
    bias: bool = False, residual: bool = False, tile: ProductTile | None = None, weight_dtype: torch.dtype | None = None,
) -> object:  # fmt: skip
    wide = weight_dtype or dtype
    x, weights = torch.zeros(tokens, k, dtype=dtype), [torch.zeros(count, k, dtype=wide) for count in counts]
    return matvec(
        x,
        weights,
        [weight[:, 0].contiguous() for weight in weights] if bias else None,
        residual=torch.zeros(tokens, counts[0], dtype=wide) if residual else None,
        weights_settled=True,
        tile=tile,
    )


def at_once(
    k: int, counts: tuple[int, ...], dtype: torch.dtype = BF16, *, norm: bool = False, bias: bool = False,
    residual: bool = False, gated: bool = False,
) -> object:  # fmt: skip
    x, weights = torch.zeros(1, k, dtype=dtype), [torch.zeros(count, k, dtype=dtype) for count in counts]
    tile = one_wave_tile(HOPPER, x.element_size(), k, sum(counts), gated)
    assert tile is not None
    return one_wave(
        x,
        weights,
        [weight[:, 0].contiguous() for weight in weights] if bias else None,
        tile=tile,
        residual=torch.zeros(1, counts[0], dtype=dtype) if residual else None,
        norm=x[0] if norm else None,
        gated=gated,
        weights_settled=True,
    )


def few(
    tokens: int, k: int, counts: tuple[int, ...], dtype: torch.dtype = BF16, *, norm: bool = False, bias: bool = False,
    residual: bool = False, gated: bool = False,
) -> object:  # fmt: skip
    x, weights = torch.zeros(tokens, k, dtype=dtype), [torch.zeros(count, k, dtype=dtype) for count in counts]
    tile = few_rows_tile(HOPPER, x.element_size(), tokens, k, sum(counts), gated, norm)
    assert tile is not None
    return few_rows(
        x,
        weights,
        [weight[:, 0].contiguous() for weight in weights] if bias else None,
        tile=tile,
        residual=torch.zeros(tokens, counts[0], dtype=dtype) if residual else None,
        norm=x[0] if norm else None,
        gated=gated,
        weights_settled=True,
    )


def gated(tokens: int, k: int, width: int, dtype: torch.dtype = BF16, *, weight_dtype: torch.dtype | None = None) -> object:
    x, weight = torch.zeros(tokens, k, dtype=dtype), torch.zeros(width, k, dtype=weight_dtype or dtype)
    return gate_up_silu(x, weight, weight, weights_settled=True)


def adapted(
    tokens: int, k: int, counts: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype = BF16,
    held: torch.dtype = FP32, *, gated: bool = False, tile: ProductTile | None = None, stacked: bool = False,
) -> object:  # fmt: skip
    x, weights = torch.zeros(tokens, k, dtype=dtype), [torch.zeros(count, k, dtype=dtype) for count in counts]

    def adapter(rank: int, count: int) -> Adapter:
        members = Members(torch.zeros(rank), torch.zeros(rank, dtype=torch.int32)) if stacked else None
        return Adapter(torch.zeros(rank, k, dtype=held), torch.zeros(count, rank, dtype=held), 1.0, members)

    lora = [adapter(rank, count) if rank else None for count, rank in zip(counts, ranks, strict=True)]
    numbers = torch.zeros(tokens, dtype=torch.int32) if stacked else None
    if gated:
        return gate_up_silu(x, weights[0], weights[1], weights_settled=True, lora=lora, lora_numbers=numbers)
    residual = torch.zeros(tokens, counts[0], dtype=dtype) if len(counts) == 1 else None
    return matvec(x, weights, residual=residual, weights_settled=True, tile=tile, lora=lora, lora_numbers=numbers)


def quantised(
    kind: str, tokens: int, k: int, counts: tuple[int, ...], dtype: torch.dtype = BF16, *, gated: bool = False
) -> object:
    x, weights = torch.zeros(tokens, k, dtype=dtype), [of_kind(kind, count, k) for count in counts]
    if gated:
        return quantised_products.gate_up_silu(x, *weights, weights_settled=True)
    residual = torch.zeros(tokens, counts[0], dtype=dtype) if len(counts) == 1 else None
    return quantised_products.matvec(x, weights, residual=residual, weights_settled=True)


def routed(tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype = BF16, *, shared: bool = False) -> Any:
    x, weight = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(experts, hidden, dtype=dtype)
    gate = weight[:1] if shared else None
    return router.route(x, weight, top_k, rounds_weights=True, gate_weight=gate, weights_settled=True)


def experts_of(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int, dtype: torch.dtype = BF16, *, shared: bool = False,
    hopper: bool = False, kept: int = 4,
) -> object:  # fmt: skip
    # Of as many experts as there have to be: their weights are real memory.
    x, few = torch.zeros(tokens, hidden, dtype=dtype), min(experts, max(top_k, kept))
    routing = routed(tokens, hidden, few, top_k, dtype, shared=shared)
    weights = torch.zeros(few, 2 * inner, hidden, dtype=dtype), torch.zeros(few, hidden, inner, dtype=dtype)
    options: dict[str, Any] = {"residual": x, "shared": x if shared else None, "weights_settled": True}
    return mixture(x, routing, *weights, hopper=hopper, **options)


def chosen(
    dtype: torch.dtype = BF16, *, rows: int = 8, vocab: int = 128256, greedy: bool = False, by_row: bool = False
) -> object:
    x, out = torch.zeros(rows, vocab, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    if greedy:
        return greedy_tokens(x, out)
    one, numbers = torch.zeros(1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    params = SamplingParams().tensor("cpu")
    return sample_tokens(x, out, params.repeat(rows, 1) if by_row else params, one, numbers, one)


def logprobs(dtype: torch.dtype = BF16, *, rows: int = 8, vocab: int = 128256, drawn: bool = False) -> object:
    x, tokens, least = torch.zeros(rows, vocab, dtype=dtype), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    params = SamplingParams().tensor("cpu").repeat(rows, 1)
    given = {"params": params, "thresholds": least} if drawn else {}
    return token_logprobs(x, tokens, torch.zeros(rows), **given)


def processed(dtype: torch.dtype = BF16, *, rows: int = 8, eos: int = 2, penalty: bool = True) -> object:
    x, one = torch.zeros(rows, 128256, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    seen = torch.zeros(rows, 128256, dtype=torch.uint8) if penalty else None
    return process_logits(x, SamplingParams().tensor("cpu"), seen=seen, eos=one.expand(eos).contiguous(), step=one)


def typical(vocab: int = 151_936) -> object:
    return typical_scores(torch.zeros(8, vocab), torch.zeros(1))


def advanced(rows: int = 64, *, columns: int = 1024, windows: int = 1, seen: bool = False) -> object:
    ids = functools.partial(torch.zeros, dtype=torch.int64)
    numbers = functools.partial(torch.zeros, dtype=torch.int32)

    state = LoopTensors(
        chosen=ids(rows),
        packed=ids(rows),
        tokens=ids(rows, 1),
        positions=ids(rows, 1),
        finished=numbers(rows),
        limits=numbers(rows),
        seq_lens=numbers(rows),
        slots=numbers(windows, rows),
        tables=numbers(windows, rows, columns),
        step=numbers(1),
        ends=ids(MOST_ENDS),
        pad=ids(1),
        drop=numbers(1),
        seen=torch.zeros(rows, 128256, dtype=torch.uint8) if seen else None,
    )
    return advance(state, 16)


def slid(rows: int = 64, *, columns: int = 1024, pages: int = 81) -> object:
    lengths, held = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, columns, dtype=torch.int32)
    return slide(lengths, held, page_size=16, sinks=1, leaving=16, pages=pages)


def forked(beams: int = 4, *, windows: int = 1) -> object:
    numbers = functools.partial(torch.zeros, dtype=torch.int32)
    tables = numbers(windows, 64, 1024)
    parents, places = torch.zeros(4 * beams, dtype=torch.int64), torch.zeros(56, 3, dtype=torch.int64)
    held = (numbers(64), numbers(1), numbers(windows, 4 * beams, 2), places)
    return fork(ForkTensors(parents, tables, tables.clone(), *held, list, beams, 16))


def continued(vocab: int, dtype: torch.dtype) -> object:
    return continuations(torch.zeros(16, vocab, dtype=dtype), torch.zeros(16), 8)


def tiles(rows: int) -> object:
    return work_list(torch.arange(rows + 1, dtype=torch.int32), rows, slots=8, packed=4, block_m=128)


def delta_layer(
    heads: int, shared: int, dim: int, tokens: int, dtype: torch.dtype, *, interleaved: bool = False
) -> tuple[DeltaInputs, DeltaWeights]:
    """What the projections of a Gated DeltaNet layer give, interleaved by key heads or not, and its weights."""
    b, a = torch.zeros(2, tokens, heads, shared, dtype=dtype)
    keys, values = heads * dim, heads * shared * dim
    if interleaved:
        qkvz = torch.zeros(tokens, heads, (2 + 2 * shared) * dim, dtype=dtype)
        q, k, v, z = qkvz.split((dim, dim, shared * dim, shared * dim), 2)
    else:
        q, k, v = torch.zeros(tokens, 2 * keys + values, dtype=dtype).split((keys, keys, values), 1)
        q, k, v = q.unflatten(1, (heads, dim)), k.unflatten(1, (heads, dim)), v.unflatten(1, (heads, shared * dim))
        z = torch.zeros(tokens, heads, shared * dim, dtype=dtype)
    x = DeltaInputs(q, k, v.unflatten(2, (shared, dim)), z.unflatten(2, (shared, dim)), b, a)
    each = torch.zeros(heads * shared, dtype=dtype)
    return x, DeltaWeights(torch.zeros(2 * keys + values, 4, dtype=dtype), each, each, torch.ones(dim, dtype=dtype), 1e-6)


def delta(heads: int = 16, shared: int = 2, dtype: torch.dtype = BF16, *, tokens: int = 1, moves: bool = False) -> object:
    """A decode step of Gated DeltaNet, in place unless its states move."""
    x, weights = delta_layer(heads, shared, 128, tokens, dtype, interleaved=moves)
    conv = torch.zeros(tokens, weights.conv.shape[0], 4, dtype=dtype)
    recurrent, slots = torch.zeros(tokens, heads * shared, 128, 128), torch.zeros(tokens, dtype=torch.int32)
    out = (conv.clone(), recurrent.clone(), slots, None) if moves else (conv, recurrent, slots, slots)
    return delta_step(x, weights, StepStates(conv, recurrent, slots, *out))


def delta_prompt(heads: int = 16, shared: int = 2, dtype: torch.dtype = BF16, *, goes_on: bool = False) -> object:
    """Gated DeltaNet over two rows, which have states before if they go on."""
    x, weights = delta_layer(heads, shared, 128, 100, dtype, interleaved=goes_on)
    before = (torch.zeros(2, weights.conv.shape[0], 4, dtype=dtype), torch.zeros(2, heads * shared, 128, 128))
    return delta_prefill(x, weights, [30, 70], *(before if goes_on else ()))
