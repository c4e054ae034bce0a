"""Steps of few rows: norms within products, and RoPE, append and attention in one launch, where both are quicker."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import hf_fastattn
from hf_fastattn.cache.batch import Batch
from hf_fastattn.kernels.attention import short_row
from hf_fastattn.kernels.attention.configs import MOST_SHORT_KEYS, MOST_SHORT_ROWS, ShortRowTile, short_heads
from hf_fastattn.kernels.layer import few_rows, matvec
from hf_fastattn.kernels.layer.configs import HOPPER, RowTile
from hf_fastattn.kernels.layer.few_rows_configs import FewRowsTile, few_rows_tile
from hf_fastattn.patches.fused import at_once
from hf_fastattn.transformers_version import CACHE
from tests.kernels.cases import assert_close
from tests.tools.fused_layers import LAYER_COUNT, build, count_launches
from tests.tools.models import COMMON, VOCAB, patch_with_graphs

BF16, FP16 = torch.bfloat16, torch.float16
# Small enough for tiny layers.
TILE = FewRowsTile(2, 1, 1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of norms and of the kernels for few rows; those of products by whether they normalise."""
    counts = count_launches(monkeypatch)
    original = few_rows.fill_few_rows
    signature = inspect.signature(original)

    def product(*args: Any) -> None:
        given = signature.bind(*args).arguments
        counts["normed" if given["norm"] is not None else "plain"] += 1
        counts["asks for L1"] += given["asks_for_l1"]
        original(*args)

    monkeypatch.setattr(few_rows, "fill_few_rows", product)
    attention = short_row.short_row

    def attend(*args: Any, **kwargs: Any) -> Any:
        counts["short_row"] += 1
        return attention(*args, **kwargs)

    monkeypatch.setattr(short_row, "short_row", attend)
    return counts


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is of short rows, also one that the host has just made, and products of 2 to 16 tokens have a tile."""
    monkeypatch.setattr(Batch, "is_short_step", lambda batch, q, *_: batch.is_decode and q.element_size() == 2)
    monkeypatch.setattr(short_row, "short_row_tile", lambda *_: ShortRowTile(16, 1))

    def tile(arch: int, itemsize: int, tokens: int, *_: Any) -> FewRowsTile | None:
        return TILE if itemsize == 2 and 1 < tokens <= 16 else None

    monkeypatch.setattr(at_once, "few_rows_tile", tile)
    monkeypatch.setattr(matvec, "few_rows_tile", tile)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "rows"), [("llama, biases", 5), ("qwen2", 2), ("qwen3", 3), ("ministral", 2), ("smollm3", 4)]
)
def test_logits(name: str, rows: int, launched: Counter[str], everywhere: None) -> None:
    stock, model = build(name).to(BF16), hf_fastattn.patch(build(name).to(BF16))
    ids = torch.randint(1, VOCAB, (rows, 10), generator=torch.Generator().manual_seed(2))
    outs, cache = [], hf_fastattn.PagedCache(model.config)
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 10)):
        launched.clear()
        with torch.no_grad():
            outs.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
        if begin:
            # The norm before gate and up is apart where these have biases; the last norm has no product behind it.
            apart = LAYER_COUNT if name == "llama, biases" else 0
            assert launched["normed"] == 2 * LAYER_COUNT - apart and launched["rms_norm"] == 1 + apart, dict(launched)
            # o and down; gate and up behind their norm.
            assert launched["plain"] == 2 * LAYER_COUNT + apart and launched["short_row"] == LAYER_COUNT, dict(launched)
    with torch.no_grad():
        want, plain = copy.deepcopy(stock).double()(ids).logits, stock(ids).logits
    assert_close("logits", torch.cat(outs, 1), plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "normed", "plain"),
    [("nothing", 2, 2), ("adapters", 1, 2), ("fp32", 0, 0), ("fp16", 0, 4), ("activation", 1, 3), ("17 rows", 0, 0)],
)
def test_what_few_rows_take(change: str, normed: int, plain: int, launched: Counter[str], everywhere: None) -> None:
    model = build("llama").to({"fp32": torch.float32, "fp16": FP16}.get(change, BF16))
    if change == "adapters":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["gate_proj"])).get_base_model()
    if change == "activation":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    hf_fastattn.patch(model)
    with torch.no_grad():
        ids = torch.ones(17 if change == "17 rows" else 3, 1, dtype=torch.long)
        model(ids, **{CACHE: hf_fastattn.PagedCache(model.config)}, use_cache=True)
    assert (launched["normed"], launched["plain"]) == (normed * LAYER_COUNT, plain * LAYER_COUNT), dict(launched)


@pytest.mark.interpreter
@pytest.mark.parametrize("short", [False, True])
def test_products_ask_for_l1_cache_beside_attention_that_takes_shared_memory(
    short: bool, launched: Counter[str], everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_fastattn.patch(build("llama").to(BF16))
    monkeypatch.setattr(Batch, "is_short_step", lambda *_: short)
    with torch.no_grad():
        model(torch.ones(3, 1, dtype=torch.long), **{CACHE: hf_fastattn.PagedCache(model.config)}, use_cache=True)
    # What attention the first layer takes is known behind its first product.
    assert launched["normed"] + launched["plain"] == 4 * LAYER_COUNT
    assert launched["asks for L1"] == (1 if short else 4 * LAYER_COUNT)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("of_tile", [False, True])
def test_one_row_asks_where_that_was_measured(asked: bool, of_tile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def noted(x: torch.Tensor, *_: Any, asks_for_l1: bool, **__: Any) -> torch.Tensor:
        found.append(asks_for_l1)
        return x

    monkeypatch.setattr(at_once, "one_wave", noted)
    monkeypatch.setattr(at_once, "one_wave_tile", lambda *_: RowTile(1, 1, l1=of_tile))
    held = at_once.Held([torch.zeros(8, 64, dtype=BF16)], None, None)
    options = {"unit_offset": False, "gated": False, "residual": None, "asks_for_l1": asked}
    at_once.product_at_once(HOPPER, held, torch.zeros(1, 64, dtype=BF16), None, 0.0, **options)
    assert found == [asked and of_tile]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((HOPPER, 2, 4, 4096, 6144, False, True), True),
        ((80, 2, 4, 4096, 6144, False, True), False),
        ((HOPPER, 4, 4, 4096, 6144, False, True), False),
        ((HOPPER, 2, 1, 4096, 6144, False, True), False),
        ((HOPPER, 2, 17, 1024, 1024, False, False), False),
        # x would not stay in the L1 cache; large weights of many tokens; gate and up that are normalised apart.
        ((HOPPER, 2, 8, 14336, 4096, False, False), False),
        ((HOPPER, 2, 16, 4096, 6144, False, True), False),
        ((HOPPER, 2, 16, 2560, 19456, True, True), False),
        ((HOPPER, 2, 16, 2560, 19456, True, False), True),
        # Output layers.
        ((HOPPER, 2, 4, 4096, 128256, False, False), False),
        ((HOPPER, 2, 4, 1024, 151936, False, False), True),
    ],
)
def test_which_products_have_a_tile(arguments: tuple[Any, ...], want: bool) -> None:
    assert (few_rows_tile(*arguments) is not None) is want


@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_divide_columns_where_they_can(tokens: int, normalised: bool, gated: bool) -> None:
    for k in (896, 1024, 1536, 2048, 2560, 3072):
        tile = few_rows_tile(HOPPER, 2, tokens, k, 4096, gated, normalised)
        assert tile is not None and k % (32 * tile.loads) == 0


def test_which_rows_are_short() -> None:
    assert short_heads(1, MOST_SHORT_KEYS) == 32 and not short_heads(1, MOST_SHORT_KEYS + 1)
    assert short_heads(4, 640) == 32 and short_heads(4, 1000) == 16 and short_heads(8, 320) == 32
    assert short_heads(8, 512 + 129) == 16 and short_heads(8, 700) == 8
    assert short_heads(MOST_SHORT_ROWS, 20) == 32 and not short_heads(MOST_SHORT_ROWS + 1, 20)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "prompt"), [(3, 200), (8, 250), (16, 250), (4, 1500)])
def test_logits_on_a_gpu(rows: int, prompt: int, launched: Counter[str]) -> None:
    config = {
        **COMMON, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 2, "initializer_range": 0.02, "vocab_size": 8192,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        stock = Qwen3ForCausalLM(Qwen3Config(**config)).to(BF16).eval()
    exact, model = copy.deepcopy(stock).float(), patch_with_graphs(copy.deepcopy(stock))
    for each in (stock, exact, model):
        rope = each.model.rotary_emb
        rope.inv_freq = type(rope)(each.model.config).to("cuda").inv_freq.float()
    ids = torch.randint(0, 8192, (rows, prompt), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_replayed > 30 and not call.fallbacks
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert bool(launched["normed"]) is bool(launched["plain"]) is hopper
    assert bool(launched["short_row"]) is (hopper and rows <= MOST_SHORT_ROWS and prompt < MOST_SHORT_KEYS)
    with torch.no_grad():
        want, plain = (each(tokens).logits.double()[:, prompt - 1 : -1] for each in (exact, stock))
    # What was chosen is the likeliest but for rounding.
    chosen = want.gather(2, tokens[:, prompt:, None])[..., 0]
    assert (want.max(2).values - chosen).max() <= 2 * (plain - want).abs().max()
    cache, outs = hf_fastattn.PagedCache(model.config), []
    with torch.no_grad():
        for begin, end in ((0, prompt), *((at, at + 1) for at in range(prompt, prompt + 39))):
            outs.append(model(tokens[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
    error, allowed = ((x - want).abs() for x in (torch.cat(outs, 1).double()[:, prompt - 1 :], plain))
    assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()
