"""Ctrl-C at any moment of a call: no page is lost, no other error comes up, and the next call is right."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.loop import decode_loop
from hf_fastattn.pages import reach
from hf_fastattn.transformers_version import CACHE
from tests.bad_input.interrupting import assert_books_agree, interrupted
from tests.tools.models import VOCAB, assert_fast, tiny
from tests.tools.reexecuted import reexecuted_loop

# How many moments of a call a test tries; 0 for all.
MOMENTS = int(os.environ.get("FASTATTN_MOMENTS", "30"))
SIGNALS = int(os.environ.get("FASTATTN_SIGNALS", "60"))
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "sliding_window": 8}
IDS = torch.randint(1, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "drafts": {"do_sample": False, "prompt_lookup_num_tokens": 2},
    # Rows that may end, so that pages are made in mid-call.
    "growth": {"do_sample": False, "eos_token_id": VOCAB - 1},
}
# Those that run in the device's loop too.
LOOPED: dict[str, dict[str, Any]] = {
    "growth": MODES["growth"],
    "beams that may end": {"do_sample": False, "num_beams": 2, "eos_token_id": VOCAB - 1},
}


@pytest.fixture(autouse=True)
def pages_in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 2)
    monkeypatch.setattr(reach, "AHEAD", 1)


def generate(model: Any, mode: str, **more: Any) -> torch.Tensor:
    ids = IDS[:1] if mode == "drafts" else IDS
    return model.generate(ids, max_new_tokens=5, **{**MODES, **LOOPED}[mode], **more)


def patched() -> Any:
    return hf_fastattn.patch(tiny("qwen2_window", **SMALL), page_size=4)


def moments(run: Callable[[], Any], event: str) -> Iterator[int]:
    """Numbers of events of `run`: all, or a sample that is another one in every session."""
    with interrupted(None, event) as counted:
        run()
    everything = range(counted.seen)
    yield from everything if not MOMENTS else sorted(random.sample(everything, min(MOMENTS, len(everything))))


# Lines begin with opcodes, so that two modes by lines are enough.
@pytest.mark.parametrize(("mode", "event"), [*((mode, "opcode") for mode in MODES), ("beams", "line"), ("growth", "line")])
def test_generate(mode: str, event: str) -> None:
    assert_right_after_ctrl_c(mode, event)


@pytest.mark.parametrize("mode", LOOPED)
def test_the_devices_loop(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "AHEAD", 2)
    with reexecuted_loop():
        model = assert_right_after_ctrl_c(mode, "opcode")
        generate(model, mode)
    assert hf_fastattn.report(model).last_call.fast_loops == 1


def assert_right_after_ctrl_c(mode: str, event: str) -> Any:
    """Wherever it comes, books agree and the next call gives stock's tokens; returns the model."""
    stock, model = tiny("qwen2_window", **SMALL), patched()
    expected = generate(stock, mode)
    assert torch.equal(generate(model, mode), expected)
    for moment in moments(lambda: generate(model, mode), event):
        with interrupted(moment, event) as interrupter:
            try:
                generate(model, mode)
            except KeyboardInterrupt as error:
                # As an interactive session does, which holds the frames of the last error.
                sys.last_value = error
        if not interrupter.where:
            # A call takes some steps more or fewer, by what the one before has left.
            continue
        assert_books_agree(model)
        assert torch.equal(generate(model, mode), expected), (moment, interrupter.where)
        assert_fast(model)
    return model


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda model, cache: model(IDS[:, 12:13], **{CACHE: cache}),
    "append": lambda model, cache: model(IDS[:, 12:], **{CACHE: cache}),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda model, cache: cache.batch_repeat_interleave(2),
    "crop": lambda model, cache: cache.crop(-3),
    "reset": lambda model, cache: cache.reset(),
    "fork": lambda model, cache: copy.deepcopy(cache),
    "leave": lambda model, cache: cache._move_out(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_users_cache_is_as_before_or_as_after(change: str) -> None:
    stock, model = tiny("qwen2_window", **SMALL), patched()
    ids = {row: IDS[row, :12].tolist() for row in range(2)}

    def start() -> Any:
        cache = hf_fastattn.PagedCache(model.config, model._fastattn.runtime.config)
        # So that crop() is allowed behind the window.
        cache.activate_past_recording()
        model(IDS[:, :12], **{CACHE: cache})
        return cache

    def check(cache: Any) -> None:
        rows, columns = max(cache.batch_size, 0) or 2, cache.get_seq_length()
        assert columns in (0, 9, 12, 13, 17)
        held = [ids[0], ids[1]] if rows == 2 else [ids[0], ids[0], ids[1], ids[1]]
        now = torch.cat((torch.tensor(held), IDS[:, 12:].repeat_interleave(rows // 2, 0)), 1)[:, : columns + 1]
        swapped = now.flip(0) if change == "reorder" else now
        ours, choices = model(IDS[:1, :1].repeat(rows, 1), **{CACHE: cache}).logits, []
        for tokens in (now, swapped):
            theirs = DynamicCache(config=stock.config)
            if columns:
                stock(tokens[:, :columns], **{CACHE: theirs})
            choices.append(stock(IDS[:1, :1].repeat(rows, 1), **{CACHE: theirs}).logits)
        assert any(torch.allclose(ours, logits, rtol=1e-3, atol=1e-3) for logits in choices)

    with torch.no_grad():
        for moment in moments(lambda: CHANGES[change](model, start()), "opcode"):
            cache = start()
            with interrupted(moment) as interrupter:
                try:
                    CHANGES[change](model, cache)
                except KeyboardInterrupt:
                    pass
            groups = cache.groups
            check(cache)
            assert groups.pages_in_use > 0
            del cache
            assert groups.pages_in_use == 0, (moment, interrupter.where)


def test_signals() -> None:
    """Real ones, which come when they like."""
    stock, model = tiny("qwen2_window", **SMALL), patched()
    expected = generate(stock, "beams")
    start = time.perf_counter()
    assert torch.equal(generate(model, "beams"), expected)
    took, hits = 1.5 * (time.perf_counter() - start), 0

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        while hits < SIGNALS:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, took))
                generate(model, "beams")
                signal.setitimer(signal.ITIMER_REAL, 0)
                continue
            except KeyboardInterrupt:
                hits += 1
            assert hf_fastattn.report(model).pages_in_use == 0
            if hits % 10 == 0:
                assert_books_agree(model)
                assert torch.equal(generate(model, "beams"), expected)
                assert_fast(model)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
