"""A streamer of the user's that changes the model: its next token is of the model as it is then, in Transformers' loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import hf_fastattn
from hf_fastattn.generation.device_sample import CHANGED, ENDS_APART
from hf_fastattn.transformers_version import CACHE
from tests.fuzz.edits import decoder_of
from tests.generation.calls import run
from tests.loop.test_decode_loop import ENDS, both
from tests.tools.combinations import rest_on_a_gpu
from tests.tools.models import padded_batch, single

NEW, AT = 14, 7


def weights_like(weight: Tensor) -> Tensor:
    return torch.linspace(-2, 2, len(weight), dtype=weight.dtype, device=weight.device)


def add_hook(model: Any) -> None:
    decoder_of(model).layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def wrap_forward(model: Any) -> None:
    norm = decoder_of(model).norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden).flip(-1)


def replace_weight(model: Any) -> None:
    norm = decoder_of(model).norm
    norm.weight = torch.nn.Parameter(weights_like(norm.weight))


def write_weight(model: Any) -> None:
    with torch.no_grad():
        decoder_of(model).norm.weight.copy_(weights_like(decoder_of(model).norm.weight))


def change_head(model: Any) -> None:
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False, device=model.device)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight.flip(0))
    model.lm_head = head


class Streamer(BaseStreamer):
    """Notes what it is given, and changes the model at the `AT`-th token."""

    def __init__(self, model: Any, change: Callable[[Any], None]) -> None:
        self.model, self.change, self.parts = model, change, list[Any]()

    def put(self, value: Tensor) -> None:
        self.parts.append(value.tolist())
        # The prompt comes first.
        if len(self.parts) == AT + 1:
            self.change(self.model)

    def end(self) -> None:
        self.parts.append("end")


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("change", [add_hook, wrap_forward, replace_weight, write_weight, change_head])
@pytest.mark.parametrize(
    ("family", "rows"),
    rest_on_a_gpu(
        [("llama", 1), ("llama", 3), ("qwen2_window", 3), ("qwen3_next", 3)], [("qwen2_window", 1), ("qwen3_next", 1)]
    ),
)
def test_the_next_token_is_of_the_changed_model(family: str, change: Callable[[Any], None], rows: int, device: str) -> None:
    stock, model = both(family, device)
    batch = on(device, padded_batch() if rows == 3 else single())
    theirs, ours = Streamer(stock, change), Streamer(model, change)
    plain = run(model, batch, NEW)
    wanted = run(stock, batch, NEW, streamer=theirs, return_dict_in_generate=True)
    got = run(model, batch, NEW, streamer=ours, return_dict_in_generate=True)
    call = hf_fastattn.report(model).last_call
    assert torch.equal(got.sequences, wanted.sequences) and ours.parts == theirs.parts
    assert not torch.equal(plain, wanted.sequences)
    assert call.fast_loops == 1 and dict(call.not_looped) == {CHANGED: 1} and call.forwards == NEW
    # Steps launched ahead do not count, and the first token is of the prompt. Graphs read what was written in place, those
    # of a decoder know nothing of its head, a first change before any is dropped with what was recorded, and prompts of
    # hybrids are none.
    others = change in (write_weight, change_head, replace_weight) or family == "qwen3_next"
    assert call.graphs_replayed >= AT - 1 if others else call.graphs_replayed == AT - 1
    assert got[CACHE].get_seq_length() == wanted[CACHE].get_seq_length()
    del got
    assert hf_fastattn.report(model).pages_in_use == 0
    assert torch.equal(run(model, batch, NEW), run(stock, batch, NEW))


def test_nothing_changed(device: str) -> None:
    stock, model = both("llama", device)
    batch, ours = on(device, padded_batch()), Streamer(None, lambda model: None)
    assert torch.equal(run(model, batch, NEW, streamer=ours), run(stock, batch, NEW))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and not call.not_looped and ours.parts[-1] == "end"


def test_a_row_that_ends_where_the_model_changes(device: str) -> None:
    stock, model = both("llama", device)
    batch = on(device, single())
    end = run(stock, batch, NEW)[0, -NEW + AT - 1].item()
    tokens = run(model, batch, NEW, streamer=Streamer(model, add_hook), eos_token_id=end)
    assert torch.equal(tokens, run(stock, batch, NEW, eos_token_id=end))
    assert not hf_fastattn.report(model).last_call.not_looped


def test_rows_that_end_apart(device: str) -> None:
    stock, model = both("llama", device)
    batch, ends = on(device, padded_batch()), ENDS[:8]
    theirs, ours = Streamer(stock, add_hook), Streamer(model, add_hook)
    wanted = run(stock, batch, NEW, streamer=theirs, eos_token_id=ends)
    assert torch.equal(run(model, batch, NEW, streamer=ours, eos_token_id=ends), wanted)
    assert ours.parts == theirs.parts
    assert dict(hf_fastattn.report(model).last_call.not_looped) == {ENDS_APART: 1}
