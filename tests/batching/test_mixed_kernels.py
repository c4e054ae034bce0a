"""Steps that take in pieces of prompts, by the kernels that they launch, in Triton's interpreter."""

from __future__ import annotations

import pytest

from hf_fastattn.batching import engine as engine_module
from tests.batching.served import Driven, Twins

pytestmark = pytest.mark.interpreter


# Of layers with a window the first has none.
@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("qwen2_window", 2)])
def test_prompts_beside_rows(family: str, layers: int, on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end inside a page, two in a step, and places for pieces that there are none for."""
    from hf_fastattn.batching import mixed_steps

    monkeypatch.setattr(mixed_steps, "UNIT", 8)
    monkeypatch.setattr(mixed_steps, "WORTH_RECORDING", 0)
    monkeypatch.setattr(engine_module, "BURST", 0)
    twins = Twins(family, "cpu", layers, backend="triton", page_size=16, mixed_steps=True)
    driven, later = Driven(twins), [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    driven.add("first", [3, 1, 4, 1, 5], 8)
    driven.run(2)
    for place, prompt in enumerate(later):
        driven.add(str(place), prompt, 3)
    driven.run()
    assert driven.tokens("first") == twins.alone([3, 1, 4, 1, 5], 8)
    assert [driven.tokens(str(place)) for place in range(2)] == [twins.alone(prompt, 3) for prompt in later]
    counters = driven.release()
    assert counters.prompt_pieces_mixed >= 3 and not counters.fallbacks and not counters.uncaptured
