"""Keys and values of 8 bits under `generate()`: the tokens of stock Transformers over a cache that rounds alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import hf_fastattn
from hf_fastattn import CacheFullError
from hf_fastattn.eval.accuracy.rounded_caches import rounded_caches
from hf_fastattn.loop import decode_loop
from hf_fastattn.transformers_version import CACHE
from tests.batching.served import prompts
from tests.tools.combinations import in_turn, rest_on_a_gpu
from tests.tools.models import (
    WINDOW,
    assert_fast,
    noisy,
    padded_batch,
    patch_with_graphs,
    real_tokens,
    single,
    tiny,
)

pytestmark = pytest.mark.usefixtures("device")

FORMATS = ("fp8", "int8")
ENDS = list(range(3, 128, 9))
# Positions of the prompt, without RoPE on some layers, norms on keys, windows, experts.
PLAIN = ("llama", "qwen3", "smollm3", "qwen2_window", "mistral_window", "qwen3_moe")


def run(model: Any, new: int = 24, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    given = {**padded_batch(), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    given = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    result = model.generate(**given)
    return result.cpu() if isinstance(result, torch.Tensor) else result


def both(family: str, device: str, kv_dtype: str, **options: Any) -> tuple[Any, Any]:
    return tiny(family).to(device), patch_with_graphs(tiny(family).to(device), kv_dtype=kv_dtype, **options)


def rounded_run(stock: Any, kv_dtype: str, *args: Any, wide_window: int = 1024, **kwargs: Any) -> Any:
    with rounded_caches(kv_dtype, wide_window):
        return run(stock, *args, **kwargs)


def assert_looped(model: Any, held: int = 0) -> Any:
    call = assert_fast(model, held=held)
    assert call.fast_loops == 1 and not call.uncaptured and call.graphs_replayed == call.forwards - 1
    return call


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    rest_on_a_gpu(in_turn(PLAIN, FORMATS), [(family, kv_dtype) for family in PLAIN for kv_dtype in FORMATS]),
)
def test_tokens_are_those_of_a_cache_that_rounds(device: str, family: str, kv_dtype: str) -> None:
    stock, model = both(family, device, kv_dtype, kv_wide_window=0)
    for kwargs in ({}, {"eos_token_id": ENDS}):
        want = rounded_run(stock, kv_dtype, wide_window=0, **kwargs)
        assert torch.equal(run(model, **kwargs), want)
        call = assert_looped(model)
        assert call.prompt_tokens == real_tokens(padded_batch())
    assert model._fastattn.runtime.groups.bytes_saved > 0


def test_rounding_changes_tokens(device: str) -> None:
    """What the other tests compare would be equal without any rounding, if models did not notice it."""
    stock, model = both("llama", device, "fp8")
    assert not torch.equal(run(model, 40), run(stock, 40))


@pytest.mark.parametrize("wide_window", [WINDOW, WINDOW - 1])
def test_layers_with_small_windows_stay_wide(device: str, wide_window: int) -> None:
    stock, model = both("qwen2_window", device, "int8", kv_wide_window=wide_window)
    assert torch.equal(run(model, 30), rounded_run(stock, "int8", 30, wide_window=wide_window))
    assert_looped(model)
    held = {group.window: group.storage.eight_bits for group in model._fastattn.runtime.groups}
    assert held == {None: torch.int8, WINDOW: torch.int8 if wide_window < WINDOW else None}


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": ENDS}])
def test_beams(device: str, kv_dtype: str, options: dict[str, Any]) -> None:
    stock, model = both("llama", device, kv_dtype)
    assert torch.equal(run(model, 20, **options), rounded_run(stock, kv_dtype, 20, **options))
    assert assert_fast(model).fast_loops == 1


def test_samples_share_the_prompt(device: str) -> None:
    stock, model = both("qwen2", device, "fp8", sampling="transformers")
    options = {**single(), "do_sample": True, "top_k": 20, "num_return_sequences": 5}
    want = rounded_run(stock, "fp8", 16, **options)
    assert torch.equal(run(model, 16, **options), want)
    assert_fast(model, prompt_tokens=37, shared=True)


def test_rows_that_end_leave_the_batch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    stock, model = both("llama", device, "fp8")
    batch, lengths = padded_batch(9, 37), [5, 24, 3, 17, 9, 24, 11, 20, 2]
    want = rounded_run(stock, "fp8", **batch)
    for row, length in enumerate(lengths):
        want[row, 37 + length :] = 0
    model._fastattn.runtime.row_limits = lengths
    assert torch.equal(run(model, **batch), want)
    assert_looped(model)


def test_drafts_are_taken_back(device: str) -> None:
    stock, model = both("llama", device, "int8")
    want = rounded_run(stock, "int8", 24, **single())
    assert torch.equal(run(model, 24, **single(), prompt_lookup_num_tokens=4), want)
    assert_fast(model)
    assistant = noisy(tiny("llama")).to(device)
    assert torch.equal(run(model, 24, **single(), assistant_model=assistant), want)
    assert_fast(model)


@pytest.mark.parametrize("chunk", [5, 16])
def test_a_prompt_in_pieces_is_the_same(device: str, chunk: int) -> None:
    """A prompt's own attention reads what is stored: there is one result, however it is cut."""
    stock, model = both("llama", device, "fp8")
    want = rounded_run(stock, "fp8", **single())
    assert torch.equal(run(model, **single(), prefill_chunk_size=chunk), want)
    assert_fast(model, prompt_tokens=37)


def test_prefixes_are_found_in_pages(device: str) -> None:
    stock, model = both("llama", device, "fp8", prefix_cache=True)
    first = single(61)
    longer = {name: torch.cat((value, value[:, :9]), 1) for name, value in first.items()}
    for batch, reused in ((first, 0), (longer, 48)):
        assert torch.equal(run(model, **batch), rounded_run(stock, "fp8", **batch))
        assert assert_fast(model, held=None).tokens_reused >= reused


def test_a_chat_over_a_returned_cache_that_is_cropped(device: str) -> None:
    stock, model = both("llama", device, "int8")
    outputs = []
    for system, options in ((stock, "int8"), (model, None)):
        with rounded_caches(options):
            result = run(system, 8, **single(), return_dict_in_generate=True)
            cache = result[CACHE]
            cache.crop(40 - cache.get_seq_length())
            turn = torch.cat((result.sequences[:, :40].cpu(), single(6, seed=3)["input_ids"]), 1)
            outputs.append(run(system, 8, input_ids=turn, attention_mask=torch.ones_like(turn), **{CACHE: cache}))
    assert torch.equal(*outputs)
    assert_fast(model, held=None)
    del cache, result
    assert hf_fastattn.report(model).pages_in_use == 0


def test_a_dynamic_cache_by_hand_gets_what_is_stored(device: str) -> None:
    stock, model = both("llama", device, "fp8")
    caches = [DynamicCache(config=stock.config) for _ in range(2)]
    want = rounded_run(stock, "fp8", 9, **single(), **{CACHE: caches[0]})
    assert torch.equal(run(model, 9, **single(), **{CACHE: caches[1]}), want)
    assert_fast(model)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert ours.keys.dtype == theirs.keys.dtype
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0.13)


def test_a_mask_that_hides_tokens_of_the_cache(device: str) -> None:
    """Pages are rewritten without them, with the scales of the tokens that stay."""
    stock, model = both("llama", device, "fp8")
    outputs = []
    for system, kv_dtype in ((stock, "fp8"), (model, None)):
        with rounded_caches(kv_dtype):
            batch = {name: value.to(device) for name, value in single(30).items()}
            result = system.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat((result.sequences, batch["input_ids"][:, :5]), 1)
            mask = torch.ones_like(ids)
            mask[:, 3:9] = 0
            outputs.append(
                system.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **{CACHE: result[CACHE]})
            )
    assert torch.equal(outputs[0].cpu(), outputs[1].cpu())
    assert_fast(model, held=None)


def test_running_batches(device: str) -> None:
    stock, model = both("llama", device, "int8")
    given = prompts(7)
    # Requests with a common beginning share pages.
    given += [given[0] + [5, 6, 7], given[0] + [8]]
    outputs = model.generate_batch(given, generation_config=GenerationConfig(max_new_tokens=12, do_sample=False))
    for prompt, output in zip(given, outputs.values(), strict=True):
        ids = torch.tensor([prompt])
        want = rounded_run(stock, "int8", 12, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert output.generated_tokens == want[0, len(prompt) :].tolist()
    call = hf_fastattn.report(model).last_call
    assert call.requests_batched == len(given) and not call.fallbacks
    assert hf_fastattn.report(model).pages_in_use == 0


def test_report_and_memory(device: str) -> None:
    plain, model = patch_with_graphs(tiny("llama").to(device)), both("llama", device, "fp8")[1]
    assert "keys, values" not in str(hf_fastattn.report(plain))
    for patched in (plain, model):
        run(patched)
    wide, narrow = hf_fastattn.report(plain), hf_fastattn.report(model)
    assert (wide.kv_dtype, wide.page_bytes_saved, narrow.kv_dtype) == (None, 0, "fp8")
    assert narrow.page_bytes_allocated + narrow.page_bytes_saved == wide.page_bytes_allocated
    # Of a head of 16 dimensions in fp32: 16 bytes and a scale of 2 instead of 64.
    assert narrow.page_bytes_allocated * 64 == wide.page_bytes_allocated * 18
    assert "fp8 with a scale for each token and head" in str(narrow)
    hf_fastattn.release_memory(model)
    assert hf_fastattn.report(model).page_bytes_allocated == 0 and torch.equal(run(model), run(model))


def test_a_memory_limit_holds_more_tokens(device: str) -> None:
    limit = 3 * 2 * 2 * 16 * 4 * 16 * 4
    small = hf_fastattn.patch(tiny("llama").to(device), memory_limit=limit)
    model = hf_fastattn.patch(tiny("llama").to(device), memory_limit=limit, kv_dtype="int8")
    with pytest.raises(CacheFullError):
        run(small, 30, **single(60))
    run(model, 30, **single(60))
    assert_fast(model)
    with pytest.raises(CacheFullError, match="memory_limit"):
        run(model, 400, **single(60))
    assert hf_fastattn.report(model).pages_in_use == 0
    run(model, 30, **single(60))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_dtype": "fp4"}, ValueError, r"kv_dtype='fp4' is unknown; choose one of \('fp8', 'int8'\)"),
        ({"kv_dtype": torch.int8}, ValueError, "kv_dtype=torch.int8 is unknown"),
        ({"kv_wide_window": 1.5}, TypeError, "kv_wide_window must be a number of tokens"),
        ({"kv_wide_window": -1}, ValueError, "kv_wide_window=-1 must not be negative"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=message):
        hf_fastattn.patch(model, **options)
    assert not hf_fastattn.report(model).patched


def test_a_gpu_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastattn import patching

    monkeypatch.setattr(patching, "converts_fp8", lambda device: False)
    monkeypatch.setattr(patching, "choose_backend", lambda *args: ("triton", "for the test"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = tiny("llama")
    with pytest.raises(ValueError, match="capability 8.9 or more, and cpu is of 8.0; use kv_dtype='int8'"):
        hf_fastattn.patch(model, kv_dtype="fp8")
    assert not hf_fastattn.report(model).patched
    hf_fastattn.patch(model, kv_dtype="int8")


def test_patching_again_with_another_format(device: str) -> None:
    _, model = both("llama", device, "fp8")
    with pytest.raises(ValueError, match="patched already, with .*kv_dtype='fp8'"):
        hf_fastattn.patch(model, cuda_graphs=True, kv_dtype="int8")
