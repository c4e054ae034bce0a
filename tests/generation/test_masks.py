"""What a mask hides, wherever it does: padding of every kind, chunks of nothing else, drafts behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.cache.known_mask import KnownMask
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import CORE, VOCAB, assert_fast, noisy, padded_batch, pair, real_tokens, single, tiny


def run(model: Any, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=8, do_sample=False, **kwargs)


def far_left(rows: int = 2, columns: int = 32) -> dict[str, torch.Tensor]:
    """Padded to a maximal length: whole chunks hold no token."""
    batch = padded_batch(rows, columns)
    batch["attention_mask"][:, :20] = 0
    return {"input_ids": batch["input_ids"] * batch["attention_mask"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("family", [*CORE, "mixtral", "qwen3"])
def test_chunks_without_a_token(family: str) -> None:
    stock, model = pair(family)
    options = {"prefill_chunk_size": 16}
    assert torch.equal(run(model, far_left(), **options), run(stock, far_left(), **options))
    assert_fast(model, fallbacks=("no row has a new token",))


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_drafts_behind_hidden_columns(drafts: str) -> None:
    stock, model = (side.double() for side in pair("llama"))
    batch = single(24)
    batch["input_ids"] = batch["input_ids"] % 4 + 5
    batch["attention_mask"][0, -3:] = 0
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafts == "assistant":
        options = {"assistant_model": noisy(tiny("llama").double())}
    assert torch.equal(run(model, batch, **options), run(stock, batch, **options))
    assert_fast(model, fallbacks=("hides",))


def test_drafts_over_a_padded_cache_whose_chat_is_fed_again() -> None:
    """As stock does it: the mask does not reach the columns of the chat at first, and shows them later."""
    given, mask = torch.randint(1, VOCAB, (1, 5), generator=torch.Generator().manual_seed(1)), torch.ones(1, 5).long()
    mask[:, :2] = 0
    tokens = []
    for model in pair("llama"):
        first = run(model, {"input_ids": given * mask, "attention_mask": mask}, return_dict_in_generate=True)
        chat = torch.cat([first.sequences, torch.arange(20, 29)[None]], 1)
        longer = {"input_ids": chat, "attention_mask": (chat != 0).long()}
        tokens.append(run(model, longer, prompt_lookup_num_tokens=5, **{CACHE: first[CACHE]}))
    assert torch.equal(*tokens)
    call = hf_fastattn.report(model).last_call
    assert call is not None and set(call.fallbacks) == {
        "the mask hides a column whose logits are read", "the mask hides tokens that are cached"
    }  # fmt: skip


@pytest.mark.parametrize("columns", [0, 1])
def test_positions_that_are_not_one_for_each_column(columns: int) -> None:
    """One that stands for all is Transformers' to repeat; none is an error, of the same kind."""
    outcomes = []
    for model in pair("llama"):
        positions = {"position_ids": torch.zeros(1, columns, dtype=torch.long)}
        with torch.no_grad():
            try:
                outcomes.append(model(single()["input_ids"], **positions, use_cache=True).logits)
            except RuntimeError as error:
                outcomes.append(str(error))
    assert torch.equal(*outcomes) if columns else outcomes[0] == outcomes[1]


def padded_right(rows: int = 3) -> dict[str, torch.Tensor]:
    batch = padded_batch(rows)
    return {name: value.flip(1) for name, value in batch.items()}


@pytest.mark.parametrize("family", [*CORE, "mistral_window"])
def test_right_padding_is_packed(family: str) -> None:
    """Embeddings, rewards, prompts filled ahead: the values at tokens are stock's, and padding is not computed."""
    stock, model = pair(family)
    batch = padded_right()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = stock(**batch, output_hidden_states=True)
        cache = hf_fastattn.PagedCache(model.config)
        ours = model(**batch, output_hidden_states=True, **{CACHE: cache})
    torch.testing.assert_close(ours.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.hidden_states[-1][real], expected.hidden_states[-1][real], rtol=1e-4, atol=1e-4)
    assert_fast(model, real_tokens(batch), held=None)


@pytest.mark.parametrize("family", [*CORE, "mistral_window"])
def test_generation_goes_on_behind_right_padding(family: str) -> None:
    stock, model = pair(family)
    batch, steps = padded_right(), torch.randint(1, VOCAB, (3, 30), generator=torch.Generator().manual_seed(2))
    parts = []
    for side in (stock, model):
        cache = None if side is stock else hf_fastattn.PagedCache(model.config, groups=model._fastattn.runtime.groups)
        mask, logits = batch["attention_mask"], []
        with torch.no_grad():
            out = side(**batch, use_cache=True, **({} if cache is None else {CACHE: cache}))
            for column in range(steps.shape[1]):
                mask = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1)
                positions = mask.sum(1, keepdim=True) - 1
                token = steps[:, column : column + 1]
                out = side(token, attention_mask=mask, position_ids=positions, **{CACHE: out[CACHE]})
                logits.append(out.logits)
        parts.append(torch.cat(logits, 1))
    torch.testing.assert_close(parts[1], parts[0], rtol=1e-3, atol=1e-3)


def test_a_penalty_that_ignores_padding_of_embeddings() -> None:
    stock, model = pair("llama")
    batch = padded_batch()
    embeds = stock.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    assert torch.equal(run(model, given, repetition_penalty=5.0), run(stock, given, repetition_penalty=5.0))
    assert_fast(model, real_tokens(batch))


def test_another_default_device() -> None:
    """What is made for the host stays there."""
    stock, model = pair("qwen2_window")
    want = run(stock, padded_batch())
    torch.set_default_device("meta")
    try:
        ours = run(model, {name: value.to("cpu") for name, value in padded_batch_on_cpu().items()})
    finally:
        torch.set_default_device(None)
    assert torch.equal(ours, want)
    assert_fast(model)


def padded_batch_on_cpu() -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return padded_batch()


@pytest.mark.parametrize("beams", [1, 3])
def test_no_step_reads_the_mask(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate() extends a mask by ones at every step: its values are known, and reading them would wait for the device."""
    _, model = pair("qwen2_window")
    known: list[bool] = []
    knows = KnownMask.knows

    def recorded(self: KnownMask, *args: Any) -> bool:
        known.append(knows(self, *args))
        return known[-1]

    monkeypatch.setattr(KnownMask, "knows", recorded)
    run(model, padded_batch(), num_beams=beams)
    # The prompt is read, and where beams come apart its rows may be others.
    assert len(known) == 8 and all(known[2:])


def test_the_mask_of_equal_rows_is_known_by_that_of_the_rows_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt nothing waits for the device, which still computes it."""
    stock, model = pair("llama")
    batch = {name: value.repeat(3, 1) for name, value in padded_batch().items()}
    known: list[bool] = []
    knows = KnownMask.knows

    def recorded(self: KnownMask, mask: Any, *args: Any) -> bool:
        known.append(knows(self, mask, *args))
        assert not known[-1] or mask.shape[0] == len(batch["input_ids"])
        return known[-1]

    monkeypatch.setattr(KnownMask, "knows", recorded)
    assert torch.equal(run(model, batch), run(stock, batch))
    assert_fast(model, int(padded_batch()["attention_mask"].sum()))
    # The prompt's alone is read.
    assert len(known) == 8 and not known[0] and all(known[1:])


def test_drafts_behind_a_hole_that_nobody_reads() -> None:
    stock, model = (side.double() for side in pair("llama"))
    batch = single(24)
    batch["input_ids"] = batch["input_ids"] % 4 + 5
    batch["attention_mask"][0, 3:7] = 0
    options = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(run(model, batch, **options), run(stock, batch, **options))
    assert_fast(model)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_row_without_a_token_over_a_cache_by_hand(drafts: bool) -> None:
    ids = torch.zeros(1, 31, dtype=torch.long)
    batch, tokens = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, []
    for side, kind in zip(pair("llama"), (DynamicCache, hf_fastattn.PagedCache), strict=True):
        more = {"assistant_model": noisy(tiny("llama"))} if drafts else {}
        tokens.append(run(side, batch, **more, **{CACHE: kind(config=side.config)}))
    assert torch.equal(*tokens)
    call = hf_fastattn.report(side).last_call
    assert call is not None and "a row of the prompt has no visible token" in call.fallbacks
