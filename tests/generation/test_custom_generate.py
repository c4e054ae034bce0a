"""Loops that a user gives to `generate(custom_generate=...)`: each distinct prompt is computed once there too."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

import hf_fastattn
from tests.tools.composites import composite, media_batch
from tests.tools.models import assert_fast, padded_batch, pair, real_tokens, single


def for_the_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a loop is given without what is for the loop."""
    ours = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer", "assistant_model")
    return {name: value for name, value in kwargs.items() if name not in ours}


def own_loop(model: Any, input_ids: Tensor, generation_config: Any = None, **kwargs: Any) -> Tensor:
    """Sampling with the model's own helpers, in which no method of Transformers computes the prompt."""
    kwargs = for_the_model(kwargs)
    for step in range(generation_config.max_new_tokens):
        following = {"next_sequence_length": 1} if step else {}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=not step, **following, **kwargs)
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        token = (outputs.logits[:, -1].float() / 2).softmax(-1).multinomial(1)
        input_ids = torch.cat([input_ids, token], 1)
    return input_ids


def with_tuples(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits from a forward that gives a tuple."""
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **for_the_model(kwargs))
    logits = model(**inputs, return_dict=False)[0]
    return logits[:, -1]


def from_stock(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    """Transformers' own loop, by its unbound method."""
    return GenerationMixin._sample(model, input_ids, **kwargs)


def run(model: Any, batch: dict[str, Tensor], loop: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, custom_generate=loop, max_new_tokens=8, do_sample=True, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
@pytest.mark.parametrize("loop", [own_loop, from_stock])
def test_samples_of_an_own_loop(family: str, loop: Any) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    expected = run(stock, batch, loop, num_return_sequences=3)
    assert torch.equal(run(model, batch, loop, num_return_sequences=3), expected)
    assert assert_fast(model, real_tokens(batch), shared=True).forwards == 8


def test_repeated_rows_of_an_own_loop() -> None:
    stock, model = pair("llama")
    batch = padded_batch()
    repeated = {name: value[[0, 1, 0, 2, 1]] for name, value in batch.items()}
    assert torch.equal(run(model, repeated, own_loop), run(stock, repeated, own_loop))
    assert_fast(model, real_tokens(batch), shared=True)


def test_repeated_images_of_an_own_loop() -> None:
    stock, model = composite("llava"), hf_fastattn.patch(composite("llava"))
    repeated = media_batch("llava", (0, 0, 1, 2))
    assert torch.equal(run(model, repeated, own_loop), run(stock, repeated, own_loop))
    assert_fast(model, real_tokens(media_batch("llava")), shared=True)


def test_forwards_that_give_tuples() -> None:
    stock, model = pair("llama")
    batch = padded_batch(1)
    expected = run(stock, batch, with_tuples, num_return_sequences=3)
    torch.testing.assert_close(run(model, batch, with_tuples, num_return_sequences=3), expected, rtol=1e-4, atol=1e-4)
    assert_fast(model, real_tokens(batch), shared=True)


def test_an_input_of_an_unknown_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Rows are kept apart, and it is said why."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **for_the_model(kwargs))
        return model(**{**inputs, "logits_to_keep": 0, "labels": input_ids}).loss[None]

    stock, model = pair("llama")
    batch = {name: value.repeat(2, 1) for name, value in single().items()}
    with caplog.at_level(logging.INFO, "hf_fastattn"):
        ours = run(model, batch, loop)
    torch.testing.assert_close(ours, run(stock, batch, loop))
    assert_fast(model, real_tokens(batch))
    assert "labels is not known to belong to a row" in caplog.text


def test_a_loop_from_a_folder(tmp_path: Path) -> None:
    """As loops from the Hub are given: by a name, with a function that takes all of generate()'s arguments."""
    (tmp_path / "custom_generate").mkdir()
    code = "\n\n".join(inspect.getsource(function) for function in (for_the_model, own_loop))
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "from __future__ import annotations\nfrom typing import Any\nimport torch\nfrom torch import Tensor\n"
        "from transformers import GenerationMixin\n\n\n" + code + "\n\n"
        "def generate(model, **kwargs):\n    kwargs.pop('custom_generate', None)\n"
        "    return GenerationMixin.generate(model, custom_generate=own_loop, **kwargs)\n"
    )
    stock, model = pair("llama")
    batch = padded_batch()
    options = {"num_return_sequences": 3, "trust_remote_code": True}
    expected = run(stock, batch, str(tmp_path), **options)
    assert torch.equal(run(model, batch, str(tmp_path), **options), expected)
    assert_fast(model, real_tokens(batch), shared=True)
