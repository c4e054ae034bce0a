"""Which weights a state is named by, and which rows of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_fastattn.cache.embedded_rows import EmbeddedRows, KnownRows
from hf_fastattn.graphs.weights_read import RowSums, embeddings_by_rows, weights_read
from tests.tools.models import tiny


def unread(decoder: Any) -> set[str]:
    read = set(map(id, weights_read(decoder)))
    return {name for name, weight in (*decoder.named_parameters(), *decoder.named_buffers()) if id(weight) not in read}


LAST = {f"layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_what_comes_after_the_last_keys_is_not_read() -> None:
    decoder = tiny("llama").model
    # Of the rotary embedding there are buffers, which are read.
    assert unread(decoder) == {"embed_tokens.weight", "norm.weight", *LAST} and len(list(decoder.buffers()))


def test_what_another_place_holds_too_is_read() -> None:
    decoder = tiny("llama").model
    decoder.layers[0].mlp = decoder.layers[2].mlp
    assert unread(decoder) == {"embed_tokens.weight", "norm.weight"}
    decoder = tiny("llama").model
    decoder.layers[0] = decoder.layers[2]
    assert not {name for name in unread(decoder) if "mlp" in name}
    decoder = tiny("llama").model
    decoder.layers[1].input_layernorm.weight = decoder.norm.weight
    decoder.layers[1].table = torch.nn.Linear(64, 128)
    decoder.layers[1].table.weight = decoder.embed_tokens.weight
    assert unread(decoder) == LAST


def test_embeddings_that_do_more_than_to_look_up_rows() -> None:
    class Mine(torch.nn.Embedding):
        pass

    for odd in (
        Mine(128, 64),
        torch.nn.Embedding(128, 64, max_norm=1.0),
        torch.nn.Embedding(128, 63),
        torch.nn.Embedding(128, 64, device="meta"),
    ):
        decoder = tiny("llama").model
        decoder.embed_tokens = odd
        assert embeddings_by_rows(decoder) is None and "embed_tokens.weight" not in unread(decoder)
    decoder = tiny("llama").model
    decoder.embed_tokens.forward = lambda ids: ids
    assert embeddings_by_rows(decoder) is None
    decoder = tiny("llama").model
    assert embeddings_by_rows(decoder) is decoder.embed_tokens.weight


def test_rows_of_tokens_and_of_all() -> None:
    weight, sums = torch.randn(50, 64), RowSums()
    every = sums.of(weight, None)
    some = sums.of(weight, np.array([7, 3, 7, 49, 50, -1]))
    assert every.tokens.tolist() == list(range(50)) and some.tokens.tolist() == [3, 7, 49]
    assert np.array_equal(every.sums[some.tokens], some.sums)
    weight[3] += 1
    assert np.flatnonzero(sums.of(weight, None).sums != every.sums).tolist() == [3]


def rows(**sums: int) -> EmbeddedRows:
    return EmbeddedRows(np.array([int(name[1:]) for name in sums]), np.array([*sums.values()]), 10)


def test_rows_that_are_known() -> None:
    known = KnownRows()
    assert known.take(None) and known.take(rows(t1=5, t2=6)) and known.take(rows(t2=6, t3=7))
    # Nothing is taken of what disagrees in part.
    assert not known.take(rows(t4=9, t1=4))
    assert known.take(rows(t4=8)) and known.take(rows(t1=5, t2=6, t3=7, t4=8))
