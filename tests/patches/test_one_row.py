"""Steps of one row: norms within products, and RoPE, append and attention in one launch, where both are quicker."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import hf_fastattn
from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.kernels.attention import append, decode, short_row
from hf_fastattn.kernels.attention.configs import MOST_SHORT_HEADS, MOST_SHORT_KEYS, ShortRowTile, short_heads
from hf_fastattn.kernels.layer.configs import HOPPER, RowTile
from hf_fastattn.patches.fused import at_once
from hf_fastattn.transformers_version import CACHE
from tests.kernels.cases import assert_close
from tests.tools.fused_layers import LAYER_COUNT, build, count_launches
from tests.tools.models import COMMON, VOCAB, patch_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop

BF16 = torch.bfloat16
# Small enough for tiny layers.
TILE = RowTile(1, 2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts = count_launches(monkeypatch)
    for module, name in ((at_once, "one_wave"), (short_row, "short_row")):
        original = getattr(module, name)

        def run(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, run)
    return counts


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single row is short, also one that the host has just made, and every product takes place at once."""
    monkeypatch.setattr(
        Batch, "is_short_step", lambda batch, q, *_: batch.rows == 1 and batch.is_decode and q.element_size() == 2
    )
    monkeypatch.setattr(short_row, "short_row_tile", lambda *_: ShortRowTile(16, 1))
    monkeypatch.setattr(at_once, "one_wave_tile", lambda _, itemsize, *__: TILE if itemsize == 2 else None)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "ministral", "smollm3"])
def test_logits(name: str, launched: Counter[str], everywhere: None) -> None:
    stock, model = build(name).to(BF16), hf_fastattn.patch(build(name).to(BF16))
    ids = torch.randint(1, VOCAB, (1, 10), generator=torch.Generator().manual_seed(2))
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 10)):
        launched.clear()
        with torch.no_grad():
            outs.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
        if begin:
            # The last norm has no product behind it.
            assert dict(launched) == {"one_wave": 4 * LAYER_COUNT, "short_row": LAYER_COUNT, "rms_norm": 1}
    with torch.no_grad():
        want, plain = copy.deepcopy(stock).double()(ids).logits, stock(ids).logits
    assert_close("logits", torch.cat(outs, 1), plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["llama", "qwen3", "ministral"])
def test_logits_where_decode_appends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row that is not short has no launch for RoPE and append; two rows have."""
    counts, paged_decode, rope_append = Counter[str](), decode.paged_decode, append.rope_append

    def attend(*args: Any, new: Any = None, **kwargs: Any) -> Any:
        counts["decode" if new is None else "decode appends"] += 1
        return paged_decode(*args, new=new, **kwargs)

    monkeypatch.setattr(decode, "paged_decode", attend)
    monkeypatch.setattr(append, "rope_append", lambda *args, **kw: (counts.update(append=1), rope_append(*args, **kw))[1])
    monkeypatch.setattr(Batch, "is_short_step", lambda *_: False)
    stock, model = build(name).to(BF16), hf_fastattn.patch(build(name).to(BF16))
    ids = torch.randint(1, VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 17), (17, 18), (18, 19), (19, 20)):
        counts.clear()
        with torch.no_grad():
            outs.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
        assert not begin or counts == {"decode appends": LAYER_COUNT}, counts
    with torch.no_grad():
        want, plain = copy.deepcopy(stock).double()(ids).logits, stock(ids).logits
        assert_close("logits", torch.cat(outs, 1), plain, want)
        counts.clear()
        model(ids[:, :1].repeat(2, 1), **{CACHE: hf_fastattn.PagedCache(model.config)}, use_cache=True)
    assert counts["append"] == LAYER_COUNT and not counts["decode appends"], counts


@pytest.mark.interpreter
@pytest.mark.parametrize("change", ["adapters", "fp32", "two rows", "activation", "biases"])
def test_what_does_not_take_place_at_once(change: str, launched: Counter[str], everywhere: None) -> None:
    name = "llama, biases" if change == "biases" else "llama"
    model = build(name) if change == "fp32" else build(name).to(BF16)
    if change == "adapters":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["gate_proj"])).get_base_model()
    if change == "activation":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    hf_fastattn.patch(model)
    ids = torch.ones(2 if change == "two rows" else 1, 1, dtype=torch.long)
    with torch.no_grad():
        model(ids, **{CACHE: hf_fastattn.PagedCache(model.config)}, use_cache=True)
    alone = {"fp32": 0, "two rows": 0}.get(change, 3) * LAYER_COUNT
    assert launched["one_wave"] == alone, dict(launched)


def _batch(short: int, rows: int = 1, columns: int = 4, **options: Any) -> Batch:
    tensors = BatchTensors(
        slots={None: torch.zeros(rows, dtype=torch.int32)},
        page_tables={None: torch.zeros(rows, columns, dtype=torch.int32)},
        seq_lens=torch.ones(rows, dtype=torch.int32),
    )
    return Batch.static(tensors, rows, BatchOptions(**options), short=short)


@pytest.mark.parametrize(
    ("short", "options", "dtype", "dim", "variant", "want"),
    [
        (MOST_SHORT_HEADS, {}, BF16, 64, None, True),
        (4, {}, BF16, 64, None, True),
        (2, {}, BF16, 64, None, False),
        (0, {}, BF16, 64, None, False),
        (MOST_SHORT_HEADS, {"batch_invariant": True}, BF16, 64, None, False),
        (MOST_SHORT_HEADS, {}, torch.float32, 64, None, False),
        (MOST_SHORT_HEADS, {}, BF16, 256, None, False),
        (MOST_SHORT_HEADS, {}, BF16, 64, object(), False),
    ],
)
def test_which_batches_are_short(
    short: int, options: dict[str, Any], dtype: torch.dtype, dim: int, variant: Any, want: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Batch, "_backend_of", lambda *_: "triton")
    monkeypatch.setattr(short_row, "arch_of", lambda _: HOPPER)
    q, pages = torch.zeros(1, 4, dim, dtype=dtype), torch.zeros(4, 16, 2, dim, dtype=dtype)
    batch = _batch(short, **options)
    assert batch.is_short_step(q, pages, variant) is want
    assert not batch.is_short_step(q.repeat(1, MOST_SHORT_HEADS // 4 + 1, 1), pages, variant)
    assert not batch.is_short_step(q, pages.to(torch.float8_e4m3fn), variant)


@pytest.mark.parametrize(("prompt", "new"), [(20, 8), (MOST_SHORT_KEYS - 8, 9), (400, 4)])
def test_the_loop_knows_how_many_keys_a_row_will_have(prompt: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    append_and_attend = Batch.append_and_attend

    def noted(batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if batch.host is None and batch.is_decode:
            seen.append(batch.short)
            assert batch.settled
        return append_and_attend(batch, *args, **kwargs)

    monkeypatch.setattr(Batch, "append_and_attend", noted)
    model = patch_with_graphs(tiny("llama"))
    with reexecuted_loop():
        for rows in (1, 3, 9):
            seen.clear()
            ids = torch.randint(1, VOCAB, (rows, prompt), generator=torch.Generator().manual_seed(1))
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
            assert hf_fastattn.report(model).last_call.fast_loops == 1
            # Three rows are recorded as four, and nine as twelve.
            assert seen and set(seen) == {short_heads({3: 4, 9: 12}.get(rows, rows), prompt + new)}


@pytest.mark.gpu
def test_logits_on_a_gpu(launched: Counter[str]) -> None:
    config = {
        **COMMON, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 2, "initializer_range": 0.02, "vocab_size": 8192,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        stock = Qwen3ForCausalLM(Qwen3Config(**config)).to(BF16).eval()
    exact, model = copy.deepcopy(stock).float(), patch_with_graphs(copy.deepcopy(stock))
    for each in (stock, exact, model):
        rope = each.model.rotary_emb
        rope.inv_freq = type(rope)(each.model.config).to("cuda").inv_freq.float()
    ids = torch.randint(0, 8192, (1, 250), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_replayed > 70 and not call.fallbacks
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert bool(launched["one_wave"]) is bool(launched["short_row"]) is hopper
    with torch.no_grad():
        want, plain = exact(tokens).logits.double()[:, 249:-1], stock(tokens).logits.double()[:, 249:-1]
    # What was chosen is the likeliest but for rounding.
    chosen = want.gather(2, tokens[:, 250:, None])[..., 0]
    assert (want.max(2).values - chosen).max() <= 2 * (plain - want).abs().max()
    cache, outs = hf_fastattn.PagedCache(model.config), []
    with torch.no_grad():
        for begin, end in ((0, 250), *((at, at + 1) for at in range(250, 329))):
            outs.append(model(tokens[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
    error, allowed = ((x - want).abs() for x in (torch.cat(outs, 1).double()[:, 249:], plain))
    assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()
