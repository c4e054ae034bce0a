"""`batched_answers`: what a patched model writes after many prompts, whose requests join and leave one running batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Tokens beside those of a stop string that are looked at for it: it may be made of others than the tokenizer makes of it.
BESIDE = 2
# Seconds to wait for an output before asking whether the batch has ended.
PATIENCE = 10.0


def batched_answers(
    model: Any,
    config: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stop: Sequence[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> list[list[int]]:
    """The tokens after each prompt, to an end token, the first stop string, or `new_tokens` of them.

    Args:
        model: patched.
        config: a `GenerationConfig` that a running batch can serve (`batching.choice.choice_of`).
        encode: a text as tokens, without special ones; `decode` the other way round.

    Raises:
        RuntimeError: the batch has ended, or a request failed.
    """
    last = BESIDE + max((len(encode(text)) for text in stop), default=0)
    found: list[list[int]] = [[] for _ in prompts]
    going = {str(row) for row in range(len(prompts))}
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        for row, tokens in enumerate(prompts):
            manager.add_request(tokens, request_id=str(row), max_new_tokens=new_tokens, streaming=bool(stop))
        while going:
            output = manager.get_result(timeout=PATIENCE)
            if output is None and not manager.is_running():
                raise RuntimeError(f"the running batch has ended: {manager.background_thread_status.fatal_error}")
            if output is None or output.request_id not in going:
                continue
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            tokens = output.generated_tokens
            if output.is_finished() or _ends(decode(tokens[-last:]), stop):
                found[int(output.request_id)] = list(tokens)
                going.remove(output.request_id)
                manager.cancel_request(output.request_id)
    return found


def _ends(text: str, stop: Sequence[str]) -> bool:
    return any(one in text for one in stop)
