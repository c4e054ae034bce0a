"""Rows of one call that begin alike: each distinct page is computed and stored once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.cache.known_mask import KnownMask
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import SAMPLING, assert_same_tokens, run
from tests.tools.models import VOCAB, assert_fast, pair, single

SIZE = 16


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], more: int = 0) -> dict[str, torch.Tensor]:
    columns = max(map(len, rows)) + more
    ids = torch.stack([torch.nn.functional.pad(row, (columns - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (columns - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def questions(count: int, document: int = 100, seed: int = 0) -> list[torch.Tensor]:
    """Prompts of one document and a question of 5 tokens or more each."""
    text = tokens(document, 1000 + seed)
    return [torch.cat((text, tokens(5 + 2 * n % 7, 100 * seed + n))) for n in range(count)]


def distinct(rows: list[torch.Tensor]) -> tuple[int, int]:
    """Tokens to compute, and tokens that other rows have, where whole pages are shared."""
    pages, own = set(), 0
    for row in rows:
        keys = [tuple(row[: end + SIZE].tolist()) for end in range(0, len(row) - SIZE + 1, SIZE)]
        # The last token of a row is computed in any case.
        keys = [key for key in keys if len(key) < len(row)]
        pages.update(keys)
        own += len(row) - SIZE * len(keys)
    computed = SIZE * len(pages) + own
    return computed, sum(map(len, rows)) - computed


def assert_each_page_once(model: Any, rows: list[torch.Tensor], copied: int = 0) -> None:
    """`copied`: tokens of pages of which other rows have the beginning alone."""
    computed, reused = distinct(rows)
    computed, reused = computed - copied, reused + copied
    call = assert_fast(model, prompt_tokens=computed, shared=None)
    assert (call.tokens_reused, reused > 0) == (reused, True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("more", [0, 11])
def test_questions_about_one_document(family: str, more: int) -> None:
    stock, model = pair(family)
    rows = questions(5)
    assert_same_tokens(stock, model, left_padded(rows, more), 20)
    assert_each_page_once(model, rows)


def test_masks_of_a_turn_are_known_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read them would wait for the turn before, with nothing launched behind it."""
    stock, model = pair("llama")
    found: list[bool] = []
    told = KnownMask.told

    def recorded(self: KnownMask, mask: torch.Tensor) -> torch.Tensor | None:
        values = told(self, mask)
        assert values is None or torch.equal(values, mask)
        found.append(values is not None)
        return values

    monkeypatch.setattr(KnownMask, "told", recorded)
    rows = questions(5)
    assert_same_tokens(stock, model, left_padded(rows, 3), 8)
    assert_each_page_once(model, rows)
    # Of both turns; steps do not ask for the values.
    assert found == [True, True]


def test_a_mask_that_was_written_to_is_read() -> None:
    known, mask = KnownMask(), torch.ones(2, 3)
    known.tell(mask, mask.bool())
    assert known.told(mask) is not None and known.told(mask.clone()) is None
    mask[0, 0] = 0
    assert known.told(mask) is None


def test_rows_that_are_no_neighbours() -> None:
    stock, model = pair("llama")
    rows = [row for both in zip(questions(3, seed=1), questions(3, 70, seed=2), strict=True) for row in both]
    assert_same_tokens(stock, model, left_padded(rows), 20)
    assert_each_page_once(model, rows)


def test_prefixes_within_prefixes() -> None:
    stock, model = pair("llama")
    system = tokens(40, 1)
    rows = [torch.cat((system, row)) for seed in range(3) for row in questions(3, 60, seed=seed)]
    assert_same_tokens(stock, model, left_padded(rows), 20)
    # The last 8 tokens of the system prompt lie in one page with the first document.
    assert_each_page_once(model, rows, copied=2 * 8)


def test_a_row_that_is_the_beginning_of_another() -> None:
    stock, model = pair("llama")
    row = tokens(150, 1)
    rows = [row[:97], row, row[:96], row[:150], row[:10]]
    assert_same_tokens(stock, model, left_padded(rows), 20)
    # Equal rows are one. Of the sixth page, the row of 96 tokens takes all but its last one.
    assert_each_page_once(model, [row[:97], row, row[:96], row[:10]], copied=15)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3, **SAMPLING}, {"num_beams": 3}])
def test_samples_and_beams_of_questions(options: dict[str, Any]) -> None:
    stock, model = pair("llama")
    rows = questions(3)
    assert_same_tokens(stock, model, left_padded(rows), 20, **options)
    assert_each_page_once(model, rows)


def test_too_little_in_common_is_computed_by_each() -> None:
    stock, model = pair("llama")
    rows = [torch.cat((tokens(17, 1), tokens(30, n))) for n in range(3)]
    assert_same_tokens(stock, model, left_padded(rows), 20)
    assert assert_fast(model, 3 * 47).tokens_reused == 0


def test_pages_behind_a_window_are_not_shared() -> None:
    stock, model = pair("qwen2_window")
    rows = questions(4)
    assert_same_tokens(stock, model, left_padded(rows), 20)
    assert assert_fast(model, sum(map(len, rows))).tokens_reused == 0


def test_images_keep_rows_apart() -> None:
    """Equal tokens may stand for other images."""
    stock, model = pair("qwen2_vl")
    rows = questions(3)
    assert_same_tokens(stock, model, left_padded([row.clamp(max=VOCAB - 8) for row in rows]), 20)
    assert assert_fast(model, sum(map(len, rows))).tokens_reused == 0


def test_both_rows_and_calls() -> None:
    stock, model = pair("llama", {"prefix_cache": True})
    first, rows = questions(3), questions(6)
    assert_same_tokens(stock, model, left_padded(first), 5)
    assert_same_tokens(stock, model, left_padded(rows), 20)
    call = assert_fast(model, held=None)
    # Of the three rows of the first call all but their last token is there, of the others the document, but for what is
    # left of its last page.
    assert call.prompt_tokens <= 3 + sum(len(row) - 96 for row in rows[3:])
    assert call.tokens_reused == sum(map(len, rows)) - call.prompt_tokens


def test_the_cache_is_the_same_without_sharing() -> None:
    """Lengths, mask and keys of the returned cache are those of rows computed one by one."""
    stock, model = pair("llama")
    batch = left_padded(questions(4), 3)
    ours, theirs = (run(one, batch, 6, return_dict_in_generate=True) for one in (model, stock))
    caches = [getattr(one, "cache", None) or one.past_key_values for one in (ours, theirs)]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    shown = torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1).bool()
    for layer, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.allclose(layer.keys.transpose(1, 2)[shown], other.keys.transpose(1, 2)[shown], atol=1e-4)
    assert hf_fastattn.report(model).last_call.tokens_reused


@pytest.mark.parametrize("padding", [0, 6, 20])
def test_one_row_goes_on_from_pages(padding: int) -> None:
    """Its cache is the one that begins on them if it has no padding; it is as after a prompt that was computed whole."""
    stock, model = pair("llama", {"prefix_cache": True})
    ids = torch.cat((torch.zeros(1, padding, dtype=torch.long), single(70)["input_ids"]), 1)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    ahead = None
    for reused in (0, 69, 69):
        found = run(model, batch, 30, return_dict_in_generate=True)
        assert assert_fast(model, held=None).tokens_reused == reused
        assert torch.equal(found.sequences, run(stock, batch, 30))
        cache = found[CACHE]
        # Columns that a longer answer would get pages for at once.
        now = cache.ahead_of(cache.get_seq_length())
        ahead = now if ahead is None else ahead
        assert cache.get_seq_length() == padding + 70 + 29 and now == ahead and not cache._is_frugal
        more = torch.cat((found.sequences, torch.tensor([[5, 9]])), 1)
        longer = {"input_ids": more, "attention_mask": torch.cat((mask, torch.ones(1, 32, dtype=torch.long)), 1)}
        assert torch.equal(run(model, longer, 8, **{CACHE: cache}), run(stock, longer, 8))
