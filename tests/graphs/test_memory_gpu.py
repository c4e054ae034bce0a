"""What may go wrong in a capture, and what graphs hold: a call goes on, and memory comes back."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import forward_graphs
from tests.graphs.test_forward_graphs_gpu import cuda_pair, graphs, on_gpu, replays, run
from tests.tools.models import VOCAB, assert_fast, padded_batch, patch_with_graphs, tiny

pytestmark = pytest.mark.gpu


def test_a_forward_that_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording it fails; the call goes on layer by layer, and the model is as good as new afterwards."""
    stock, model = cuda_pair("llama")
    want = run(stock)
    kind = type(model.model.norm)
    forward = kind.forward

    def waits(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) if float(x.abs().max()) >= 0 else x

    monkeypatch.setattr(kind, "forward", waits)
    assert torch.equal(run(model), want)
    # A forward of a test's own, which might look at the batch.
    call = assert_fast(model, fallbacks=("padding stays",))
    assert call.graphs_replayed == 0 and "capturing it failed" in next(iter(call.uncaptured))
    monkeypatch.setattr(kind, "forward", forward)
    for _ in range(2):
        assert torch.equal(run(model), want)
    assert replays(model)[1] > 0
    # The random generator counts for nobody else, and nothing is left in the pool of the failed capture.
    assert torch.equal(run(model, do_sample=True), run(stock, do_sample=True))
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**24, device="cuda")
    del held
    assert torch.cuda.memory_allocated() == before


def test_out_of_memory_while_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = cuda_pair("llama")
    want = run(stock)
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward

    def full(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory left")
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", full)
        assert torch.equal(run(model), want)
        assert "OutOfMemoryError" in next(iter(assert_fast(model, fallbacks=("padding stays",)).uncaptured))
    assert torch.equal(run(model), want) and replays(model)[1] > 0


def test_nothing_is_collected_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a model that is gone would be freed there."""
    stock, model = cuda_pair("llama")
    want = run(stock, 4)
    kind, seen = type(model.model.embed_tokens), []
    forward = kind.forward

    def noting(self: Any, *args: Any) -> torch.Tensor:
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        return forward(self, *args)

    monkeypatch.setattr(kind, "forward", noting)
    for _ in range(3):
        assert torch.equal(run(model, 4), want)
    assert (True, False) in seen and (True, True) not in seen and gc.isenabled()


def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    # Soon there are as many as there may be.
    monkeypatch.setattr(forward_graphs, "MAX_EXTENDS", 2)
    model = patch_with_graphs(tiny("llama", num_hidden_layers=2).to("cuda"))
    choose = random.Random(0)
    allocated = []
    for call in range(200):
        rows, longest, new = choose.randint(1, 12), choose.randint(10, 200), choose.randint(1, 60)
        beams = choose.choice([1, 1, 1, 2])
        model.generate(
            **on_gpu(padded_batch(rows, longest, seed=call)), max_new_tokens=new, do_sample=beams == 1, num_beams=beams
        )
        assert len(graphs(model)) <= forward_graphs.MAX_GRAPHS + forward_graphs.MAX_EXTENDS
        assert hf_fastattn.report(model).pages_in_use == 0
        if call % 50 == 49:
            gc.collect()
            own = hf_fastattn.report(model).page_bytes_allocated
            allocated.append((torch.cuda.memory_allocated() - own, torch.cuda.memory_reserved()))
    assert allocated[-1][0] <= allocated[0][0] + 2**22
    assert allocated[-1][1] <= allocated[1][1] * 1.25


def test_unpatch_frees_them() -> None:
    # What a stream keeps for cuBLAS stays.
    run(patch_with_graphs(tiny("llama").to("cuda")))
    model = tiny("llama").to("cuda")
    run(model)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    patch_with_graphs(model)
    run(model)
    assert replays(model)[1] > 0
    hf_fastattn.unpatch(model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**16


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("shape", [(64, 512, 96), (8, 2048, 64), (1, 8192, 64)], ids=str)
def test_no_larger_than_stock(shape: tuple[int, int, int], ends: bool) -> None:
    """The peak of a first call, at sizes where keys and activations outweigh what has a size of its own."""
    rows, columns, new = shape
    size = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = tiny("qwen3", num_hidden_layers=8, head_dim=128, max_position_embeddings=16384, **size).to(
        "cuda", torch.bfloat16
    )
    ids = torch.randint(1, VOCAB, (rows, columns), device="cuda")
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    options |= {"eos_token_id": VOCAB - 1} if ends else {}

    def peak() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return torch.cuda.max_memory_allocated()

    stock = peak()
    patch_with_graphs(model)
    # Tables, graphs and workspaces.
    assert peak() <= stock + 2**24
    call = assert_fast(model)
    needed = rows * (columns + new + 16) * 8 * 2 * 8 * 128 * 2
    assert call.graphs_captured == 1 and hf_fastattn.report(model).page_bytes_allocated <= needed
