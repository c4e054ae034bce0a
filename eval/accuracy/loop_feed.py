"""Texts through the loop that the device drives: tokens forced inside its recorded steps, tokens that it chooses and draws.

Every scored token of a window is generated: a row's prompt is what comes before them, and rows are over at different
steps, after their last token. With `share` two copies of each row share the pages of its prompt and say something else;
one of them is over early. So steps of fewer rows follow, and prefixes that rows share are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.patching import find_model

COPIES = 3


@dataclass(frozen=True)
class Scores:
    """What the loop says of the scored tokens of each window.

    Attributes:
        logprobs: of each window, `[scored]` fp32.
        choices: of each window, `[scored]` int64: the tokens that the steps would have taken.
    """

    logprobs: list[Tensor]
    choices: list[Tensor]


def why_no_loop(model: Any) -> str | None:
    """Why the device's loop cannot be looked at here at all; None if it can."""
    try:
        import triton  # noqa: F401  only whether it is there
    except ImportError:
        return "the device's loop needs Triton"
    target = find_model(model)
    if target.device.type not in ("cuda", "cpu"):
        return f"the model is on {target.device.type}"
    # Not before: it imports Triton.
    from hf_fastattn.loop.known_class import why_not_class

    return why_not_class(target) if hasattr(target, "_fastattn") else None


@contextmanager
def exercised(model: Any) -> Iterator[None]:
    """Inside, the loop does for short texts and few rows what it does for long ones, and steps of the CPU are run again.

    Smaller steps are recorded however few follow, and prefixes are read once however little it saves.
    """
    with ExitStack() as stack:
        if find_model(model).device.type == "cpu":
            # Not before: it imports Triton.
            from hf_fastattn.eval.accuracy.reexecuted import reexecuted_loop

            stack.enter_context(reexecuted_loop())
        stack.enter_context(mock.patch("hf_fastattn.loop.decode_loop.WORTH_CAPTURING", 1))
        stack.enter_context(mock.patch("hf_fastattn.cache.prefix_groups.WORTH_BYTES", 0))
        yield


@torch.no_grad()
def forced_scores(model: Any, batch: WindowBatch, share: bool) -> Scores:
    """Force the scored tokens of every window in one greedy `generate()`.

    Args:
        model: patched; the call runs in the device's loop, or its counters say why not.
        share: with copies of each row.
    """
    copies = COPIES if share else 1
    rows = [torch.tensor(window.ids) for window in batch.windows]
    scored = [window.scored for window in batch.windows]
    end = _unused(batch, find_model(model).config.get_text_config(decoder=True).vocab_size)
    ids, mask = _left_padded([row[: len(row) - count] for row, count in zip(rows, scored, strict=True)])
    tokens = torch.full((len(rows) * copies, max(scored) + 1), end)
    for index, (row, count) in enumerate(zip(rows, scored, strict=True)):
        for copy in range(copies):
            tokens[index * copies + copy, :count] = row[len(row) - count :].roll(copy - _place(index, share))
        if share:
            tokens[index * copies + 2, min(3 + 2 * index, count) :] = end
    processor = ForcedTokens(tokens, [end])
    ids, mask = (table.repeat_interleave(copies, 0).to(model.device) for table in (ids, mask))
    if find_model(model)._fastattn.runtime.config.prefix_cache:
        # Pages of the prompts stay for the call that counts.
        model.generate(ids[::copies], attention_mask=mask[::copies], max_new_tokens=1)
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        eos_token_id=end,
        logits_processor=LogitsProcessorList([processor]),
    )
    own = [(index * copies + _place(index, share), count) for index, count in enumerate(scored)]
    return Scores(
        [processor.logprobs[row, :count] for row, count in own], [processor.choices[row, :count] for row, count in own]
    )


def _place(index: int, share: bool) -> int:
    """Which of a row's copies says what the window says: the second and the first in turn.

    A first row is what others of its group are read by, and the one that a group before it takes in; a second row is one
    that may be read by another.
    """
    return 1 - index % 2 if share else 0


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return ids, mask


def _unused(batch: WindowBatch, vocabulary: int) -> int:
    """A token that no window holds, to end rows with.

    Raises:
        ValueError: there is none.
    """
    held = set(batch.ids.flatten().tolist())
    end = next((token for token in range(vocabulary - 1, -1, -1) if token not in held), None)
    if end is None:
        raise ValueError(f"the windows hold all {vocabulary} tokens of the model, so none is left to end rows: use fewer")
    return end


@torch.no_grad()
def drawn(model: Any, batch: WindowBatch, context: int, seed: int, **options: Any) -> WindowBatch:
    """Tokens that a plain sampled `generate()` adds to the last `context` tokens of each window, as rows to score.

    Args:
        seed: of torch's generator, which the loop takes its own from.
        options: of `generate()`; `max_new_tokens` among them.
    """
    ids, mask = (table[:, -context:].to(model.device) for table in (batch.ids, batch.mask))
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=mask.long(), do_sample=True, **options).cpu()
    copies = len(out) // len(ids)
    shown = mask.cpu().repeat_interleave(copies, 0)
    new = torch.ones(len(out), out.shape[1] - ids.shape[1], dtype=torch.bool)
    return WindowBatch((), out, torch.cat((shown, new), 1))
