"""Generation without end: sinks and a window, against a plain implementation that keeps all keys and picks among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hf_fastattn
from hf_fastattn import PagedCache, Streaming
from hf_fastattn.stream_layout import StreamLayout
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import VOCAB, assert_fast, tiny
from tests.tools.reexecuted import reexecuted_loop

STREAM, PAGE = Streaming(sinks=4, window=24, block=8), 4
LAYOUT = STREAM.layout(PAGE)
# All kinds of frequencies of Transformers; those of LongRoPE for rows within and past the length that a model was made for.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "longrope, past": {
        "rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def model_with(rope: str = "default", **changes: Any) -> Any:
    torch.manual_seed(3)
    return tiny("llama", rope_parameters={"rope_theta": 10000.0, **ROPES[rope]}, **changes)


def kept(token: int, layout: StreamLayout) -> list[int]:
    """The tokens of a row that `token`, one of them, sees."""
    gone = -(-max(token + 1 - layout.capacity, 0) // layout.step) * layout.step
    sinks = layout.sinks * layout.page_size
    return [*range(min(sinks, token + 1)), *range(sinks + gone, token + 1)]


@torch.no_grad()
def streamed_logits(model: Any, tokens: Tensor, layout: StreamLayout, chosen_from: int | None = None) -> Tensor:
    """`[S, V]` of `tokens: [S]`, one by one: each layer keeps all keys before RoPE, and rotates those that a token sees."""
    base, found = model.model, []
    # Frequencies that depend on the length are those of a full row.
    every = base.rotary_emb(model.lm_head.weight, torch.arange(layout.capacity, device=tokens.device)[None])
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in base.layers]
    for token in range(len(tokens)):
        seen = kept(token, layout)
        x = base.embed_tokens(tokens[None, token : token + 1])
        cos, sin = (table[:, : len(seen)] for table in every)
        for layer, keys in zip(base.layers, past, strict=True):
            inner, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).view(1, 1, -1, inner.head_dim).transpose(1, 2)
                for project in (inner.q_proj, inner.k_proj, inner.v_proj)
            )
            keys.append((k, v))
            k, v = (torch.cat([keys[place][part] for place in seen], 2) for part in (0, 1))
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            k, _ = apply_rotary_pos_emb(k, k, cos, sin)
            ratio = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
            out = torch.softmax(q @ k.transpose(2, 3) * inner.scaling, -1) @ v
            x = x + inner.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        found.append(model.lm_head(base.norm(x))[0])
        if chosen_from is not None and chosen_from <= token + 1 < len(tokens):
            tokens[token + 1] = found[-1][0].argmax()
    return torch.cat(found)


def by_steps(model: Any, tokens: Tensor, sizes: list[int]) -> Tensor:
    """The same of a patched model, in forwards of these sizes."""
    cache, found, first = PagedCache(model.config), [], 0
    for size in sizes:
        with torch.no_grad():
            found.append(model(tokens[None, first : first + size], **{CACHE: cache}).logits[0])
        first += size
    assert cache.get_seq_length() == len(tokens) and max(cache.lengths) <= LAYOUT.capacity
    return torch.cat(found)


@pytest.fixture
def tokens() -> Tensor:
    torch.manual_seed(5)
    # No padding token, which generate() would hide.
    return torch.randint(1, VOCAB, (120,))


@pytest.mark.parametrize("rope", ROPES)
def test_any_pieces_are_one_stream(rope, tokens):
    model = model_with(rope)
    want = streamed_logits(model, tokens, LAYOUT)
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        for sizes in ([120], [40, *[1] * 30, 33, 17]):
            got = by_steps(model, tokens, sizes)
            torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
            assert not hf_fastattn.report(model).last_call.fallbacks
        assert model._fastattn.runtime.groups.pages_in_use == 0


def test_a_single_layer_is_the_window_encoded_again(tokens):
    """Keys of one layer depend on nothing before them, so forgetting is the same as never having read."""
    model = model_with(num_hidden_layers=1)
    want = [model(tokens[None, kept(token, LAYOUT)]).logits[0, -1] for token in (10, 35, 36, 80, 119)]
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        got = by_steps(model, tokens, [60, *[1] * 60])
    torch.testing.assert_close(got[[10, 35, 36, 80, 119]], torch.stack(want), atol=1e-4, rtol=1e-4)


def test_sizes_say_what_a_token_sees():
    for streaming in (STREAM, Streaming(sinks=5, window=33), Streaming(0, 1, 1), Streaming(4, 64, 3)):
        for page in (1, 4, 16):
            layout = streaming.layout(page)
            # From the first token on that does not see all.
            for token in range(layout.capacity, layout.capacity + 3 * layout.step):
                seen = kept(token, layout)
                recent = len(seen) - layout.sinks * page
                assert streaming.window <= recent <= streaming.window + layout.step + page
                assert seen[: streaming.sinks] == list(range(streaming.sinks)) and len(seen) <= layout.capacity


# ---- generate() -----------------------------------------------------------------------------------------------


def greedy(model: Any, prompt: Tensor, new: int) -> Tensor:
    """By the plain implementation, `[new]`."""
    row = torch.cat((prompt, prompt.new_zeros(new)))
    streamed_logits(model, row, LAYOUT, chosen_from=len(prompt))
    return row[len(prompt) :]


@pytest.mark.parametrize("length", [10, 33, 70])
def test_greedy_tokens(length, tokens):
    model, prompt = model_with("llama3"), tokens[None, :length]
    want = greedy(model, prompt[0], 40)
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE), reexecuted_loop():
        got = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
        calls = assert_fast(model)
        assert calls.fast_loops == 1 and calls.graphs_replayed == 39
        assert model._fastattn.runtime.groups.pages_in_use == 0
    assert torch.equal(got[0, length:], want)


def test_rows_of_any_lengths_in_either_loop(tokens):
    model = model_with()
    ids, mask = tokens[:120].view(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :13] = mask[2, :31] = 0
    call = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        want = model.generate(ids, **call)
        assert assert_fast(model).fast_loops == 0
        with reexecuted_loop():
            got = model.generate(ids, **call)
            assert assert_fast(model).fast_loops == 1
        alone = model.generate(ids[:1, 13:], **{**call, "attention_mask": mask[:1, 13:]})
    assert torch.equal(got, want) and torch.equal(want[0, 40:], alone[0, 27:])


def test_rows_end_and_samples_share(tokens):
    """Samples of a prompt go on apart; rows that end leave the batch, and the others draw what they would have drawn."""
    model, prompt = model_with(), tokens[None, :50]
    call = {"max_new_tokens": 80, "do_sample": True, "top_k": 2, "num_return_sequences": 6, "pad_token_id": 0}
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE), reexecuted_loop():
        torch.manual_seed(1)
        samples = model.generate(prompt, **call)
        calls = assert_fast(model)
        assert calls.fast_loops == 1 and calls.prompt_tokens == 50 and calls.pages_copied > 0
        assert model._fastattn.runtime.groups.pages_in_use == 0
        end = int(samples[0, 60])
        torch.manual_seed(1)
        ended = model.generate(prompt, eos_token_id=end, **call)
    for row in range(6):
        # A row that another one had written to would have drawn others.
        logits = streamed_logits(model, samples[row, :-1].clone(), LAYOUT)[49:]
        chosen = logits.gather(1, samples[row, 50:, None])[:, 0]
        assert bool((chosen >= logits.topk(2).values[:, 1] - 1e-3).all())
        new = samples[row, 50:].tolist()
        stop = new.index(end) + 1 if end in new else len(new)
        assert ended[row, 50 : 50 + stop].tolist() == new[:stop]


def test_greedy_copies_of_a_prompt_stay_alike(tokens):
    """Equal rows write the same: if one wrote into a page that another still reads, they would part."""
    model, prompt = model_with(), tokens[None, :50].repeat(4, 1)
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE), reexecuted_loop():
        rows = model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert torch.equal(rows[0, 50:], greedy(model, prompt[0], 60)) and bool((rows == rows[:1]).all())


def test_pages_and_tensors_stay_as_many(tokens):
    """Past all positions that the model knows, again and again."""
    model = model_with(max_position_embeddings=64, num_hidden_layers=1)
    held: list[int] = []

    class Watch:
        def put(self, value: Tensor) -> None:
            held.append(model._fastattn.runtime.groups.pages_in_use)

        def end(self) -> None:
            pass

    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE), reexecuted_loop():
        rows = model.generate(tokens[None, :50], max_new_tokens=1000, do_sample=False, pad_token_id=0, streamer=Watch())
        calls, groups = assert_fast(model), model._fastattn.runtime.groups
        assert rows.shape == (1, 1050) and calls.fast_loops == 1
        assert set(held[1:]) == {LAYOUT.pages} and calls.pages_allocated == LAYOUT.pages
        assert groups.group(None).storage.capacity <= LAYOUT.pages + 1
        assert model._fastattn.runtime.loop_graphs.state.columns == 1024
        assert groups.pages_in_use == 0


def test_chat_goes_on_with_the_same_cache(tokens):
    """A user's cache holds what was streamed, and every turn goes on from it."""
    model = model_with()
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        for looped in (False, True):
            cache, row = PagedCache(model.config), tokens[None, :30]
            for turn in range(3):
                options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, CACHE: cache}
                if looped:
                    with reexecuted_loop():
                        row = model.generate(row, **options)
                        assert assert_fast(model, held=None).fast_loops == 1
                else:
                    row = model.generate(row, **options)
                assert cache.get_seq_length() == row.shape[1] - 1
                row = torch.cat((row, tokens[None, turn * 20 : turn * 20 + 45]), 1)
            want = streamed_logits(model, row[0], LAYOUT)[-1].argmax()
            got = model.generate(row, **{**options, "max_new_tokens": 1})[0, -1]
            assert want == got
            cache.reset()
        assert model._fastattn.runtime.groups.pages_in_use == 0


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("at", [1, 12, 37])
def test_interrupted_calls_leave_nothing(at, looped, tokens):
    model = model_with()

    class Interrupt:
        count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == at:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    call = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE), pytest.MonkeyPatch.context():
        want = model.generate(tokens[None, :50], **call)
        with reexecuted_loop():
            model._fastattn.runtime.loop_graphs._enabled = looped
            with pytest.raises(KeyboardInterrupt):
                model.generate(tokens[None, :50], streamer=Interrupt(), **call)
            assert model._fastattn.runtime.groups.pages_in_use == 0
            assert torch.equal(model.generate(tokens[None, :50], **call), want)


def test_memory_limit_is_named(tokens):
    model = model_with()
    page_bytes = 2 * 3 * PAGE * 2 * 16 * 4
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE, memory_limit=(LAYOUT.pages - 1) * page_bytes):
        with pytest.raises(hf_fastattn.CacheFullError, match="memory_limit"):
            model.generate(tokens[None, :50], max_new_tokens=60, do_sample=False, pad_token_id=0)
        assert model._fastattn.runtime.groups.pages_in_use == 0
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE, memory_limit=LAYOUT.pages * page_bytes):
        assert model.generate(tokens[None, :50], max_new_tokens=60, do_sample=False).shape[1] == 110
