"""What is read of a prompt to see whether its rows begin alike, on the host."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.generation.prompt_tokens import begin_alike, tokens_of_rows
from hf_fastattn.generation.shared_prompt import tokens_in_common
from hf_fastattn.pages.prefix_index import rows_of_tokens


@pytest.mark.parametrize("padded", [False, True])
def test_what_begins_alike(padded):
    ids = torch.arange(60).view(3, 20)
    mask = torch.ones_like(ids) if padded else None
    assert not begin_alike(ids, mask, 4)
    ids[2, :4] = ids[0, :4]
    assert begin_alike(ids, mask, 4) and not begin_alike(ids, mask, 5)


def test_padding_is_not_looked_at():
    ids, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    ids[1, 3:7] = ids[0, 3:7]
    assert not begin_alike(ids, mask, 4)
    ids[1, :4] = ids[0, 3:7]
    assert begin_alike(ids, mask, 4)


def test_gaps_in_a_mask_are_left_to_others():
    ids, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 5] = 0
    assert begin_alike(ids, mask, 4)


def test_nothing_that_could_be_shared_is_overlooked():
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(200):
        rows, columns = (int(torch.randint(1, most, (), generator=generator)) for most in (5, 9))
        ids = torch.randint(0, 2, (rows, columns), generator=generator)
        mask = torch.ones_like(ids)
        for row in mask:
            row[: int(torch.randint(0, columns, (), generator=generator))] = 0
        found = tokens_of_rows(ids, mask, None)
        assert not isinstance(found, str)
        shared = tokens_in_common(rows_of_tokens(found[0], 2), 2)
        seen.append((begin_alike(ids, mask, 2), shared > 0))
    assert not any(saved and not alike for alike, saved in seen)
    assert (True, True) in seen and (False, False) in seen
