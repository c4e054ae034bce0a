"""Whether the patched model's draws follow stock's distribution, and are independent of each other.

    python -m hf_fastattn.eval.sampling --model <hub id or path> --output results

Samples of several prompts are drawn with temperature, top-k, top-p, min-p and a repetition penalty, each alone and all
together; with end tokens rows leave the batch early. From each token the number is computed that it was drawn by, if
it came from stock's distribution: these are to be uniform, and independent between the samples of a prompt, the steps of a
row, the prompts of a batch, and calls. Exits with 1 if one of the tests alarms, corrected for their number by Holm's
method, or a call on a GPU did not run in the device's loop.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import hf_fastattn
from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy.draws import numbers_of
from hf_fastattn.eval.accuracy.independence import Numbers, holm, independent, sums_to_nothing, tail, uniform
from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.processes import measured, own_device
from hf_fastattn.eval.accuracy.sampling_summary import draw, markdown
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.checkpoint.recall import heldout_documents
from hf_fastattn.eval.choices import SAMPLERS
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.progress import counted

# A test alarms if, with all others, chance alone would do that less often.
LEVEL = 1e-3
# Tokens that stock would never draw, as a share: a tie at a threshold may be rounded the other way.
IMPOSSIBLE = 1e-3
# Options that change no figure, or are said elsewhere.
UNSAID = ("output", "quiet", "model", "threads")
# Where the threshold that is off lies, for each option.
OFF: dict[str, Any] = {"temperature": 0.75, "top_k": 0.75, "top_p": 0.95, "min_p": 1.5, "repetition_penalty": 0.75}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if nothing alarms, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval sampling")
    options = made.parse(argv)
    options.device = own_device(options.device or default_device())
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    except ValueError as error:
        made.error(str(error))
    record = {
        "evaluation": "sampling",
        "command": command("hf_fastattn.eval.sampling", argv),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in UNSAID},
        "environment": environment(options.device),
        **run(model, tokenizer, options),
    }
    record["seconds"] = round(time.perf_counter() - start, 1)
    report.write(options.output, "sampling", markdown(record), record, lambda plt: draw(plt, record))
    return 0 if record["verdict"] == "green" else 1


def run(model: Any, tokenizer: Any, options: Any) -> dict[str, Any]:
    """All cases, and the verdict over all their tests."""
    prompts = _prompts(tokenizer, options.prompts, options.length)
    ends = _end_tokens(tokenizer)
    names = options.case or list(SAMPLERS)

    def measure(part: tuple[int, str]) -> dict[str, Any]:
        number, name = part
        asked = dict(SAMPLERS[name])
        if name == "ends":
            asked["eos_token_id"] = ends
        return {"name": name, **_case(model, prompts, asked, options, options.seed + 1000 * number)}

    with counted(len(names), "sampling", "case", options.quiet) as each:
        cases = measured(list(enumerate(names)), measure, Journal(None, {}), each)
    tests = [(case, test) for case in cases for test in case["tests"]]
    for (_, test), corrected in zip(tests, holm([test["p"] for _, test in tests]), strict=True):
        test.update(corrected=corrected, alarms=corrected < LEVEL)
    off = [case["name"] for case in cases if case["off_loop"]]
    on_gpu = model.device.type == "cuda"
    alarms = any(test["alarms"] for _, test in tests) or any(case["impossible_share"] > IMPOSSIBLE for case in cases)
    return {
        "cases": cases,
        "level": LEVEL,
        "path": "Transformers' loop" if off else "the device's loop",
        "off_loop": off,
        "verdict": "red" if alarms or (on_gpu and off) else "green",
    }


def _case(model: Any, prompts: list[list[int]], asked: dict[str, Any], options: Any, seed: int) -> dict[str, Any]:
    """Draw, compute the numbers, and test them."""
    drawn, loops, reasons = _drawn(model, prompts, asked, options, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (options.calls, len(prompts), options.samples, options.new)
    numbers, repeats, variances = (np.full(shape, np.nan) for _ in range(3))
    impossible = 0
    for call, batch in enumerate(drawn):
        for place, sequences in enumerate(batch):
            found = numbers_of(model, sequences, len(prompts[place]), asked, generator)
            there = (call, place, slice(None), slice(found.numbers.shape[1]))
            numbers[there], repeats[there], variances[there] = found.numbers, found.repeats, found.variances
            impossible += found.impossible
    tokens = int((~np.isnan(numbers)).sum())
    found_p = {**_tests(numbers), "tokens that were there before": sums_to_nothing(repeats, variances)}
    tests = [{"name": name, "p": p} for name, p in found_p.items()]
    return {
        "options": {name: value for name, value in asked.items() if name != "eos_token_id"},
        "tokens": tokens,
        "impossible_share": impossible / max(tokens, 1),
        "tests": tests,
        "off_loop": dict(reasons) if loops < options.calls else {},
        "histogram": np.histogram(numbers[~np.isnan(numbers)], 20, (0, 1))[0].tolist(),
        "ended": float(np.isnan(numbers[..., -1]).mean()),
    }


def _tests(numbers: Numbers) -> dict[str, float]:
    """P-values of numbers `[calls, prompts, samples, tokens]`."""
    found = {"as stock's distribution": uniform(numbers.ravel()), "the least likely tokens": tail(numbers.ravel())}
    found["samples of a prompt"] = independent(numbers[:, :, 0::2].ravel(), numbers[:, :, 1::2].ravel())
    found["steps of a row"] = independent(numbers[..., :-1].ravel(), numbers[..., 1:].ravel())
    if numbers.shape[1] > 1:
        found["prompts of a batch"] = independent(numbers[:, :-1:2].ravel(), numbers[:, 1::2].ravel())
    if numbers.shape[0] > 1:
        found["calls"] = independent(numbers[:-1:2].ravel(), numbers[1::2].ravel())
    ended = np.isnan(numbers[..., -1]).any((1, 2))
    if ended.any():
        # Tokens of rows that go on after others of their call have ended.
        after = np.maximum.accumulate(np.isnan(numbers).any((1, 2)), axis=-1)
        late = np.where(after[:, None, None, :], numbers, np.nan)
        found["after rows have ended"] = uniform(late.ravel())
        found["samples after rows have ended"] = independent(late[:, :, 0::2].ravel(), late[:, :, 1::2].ravel())
    return found


def _drawn(
    model: Any, prompts: list[list[int]], asked: dict[str, Any], options: Any, seed: int
) -> tuple[list[list[torch.Tensor]], int, Counter[str]]:
    """Of each call and prompt the sequences; how many calls ran in the device's loop, and why others did not."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64, device="cpu")
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :], mask[place, width - len(prompt) :] = torch.tensor(prompt), 1
    given = dict(asked)
    if options.inject == "threshold":
        given |= {name: type(value)(value * OFF[name]) for name, value in asked.items() if name in OFF}
    loops, reasons, drawn = 0, Counter[str](), []
    with hf_fastattn.patched(model):
        for call in range(options.calls):
            torch.manual_seed(seed + call)
            out = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, max_new_tokens=options.new,
                num_return_sequences=options.samples, pad_token_id=0, **{"top_k": 0, **given},
            ).cpu()  # fmt: skip
            counters = hf_fastattn.report(model).last_call
            assert counters is not None
            loops += counters.fast_loops
            reasons.update(counters.not_looped)
            rows = out.view(len(prompts), options.samples, -1)
            if options.inject == "twins":
                rows[:, 1::2] = rows[:, 0::2]
            drawn.append([rows[place, :, width - len(prompt) :] for place, prompt in enumerate(prompts)])
    return drawn, loops, reasons


def _prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The beginnings of held-out documents, of lengths that differ a little."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = [document["text"][: 8 * length] for document in heldout_documents()]
    found = []
    for place in range(count):
        tokens = tokenizer.encode(texts[place % len(texts)], add_special_tokens=False)
        found.append([*head, *tokens[place : place + length - place % 3]])
    return found


def _end_tokens(tokenizer: Any) -> list[int]:
    """Tokens that come up often enough for rows to end at all lengths."""
    return [tokenizer.encode(text, add_special_tokens=False)[-1] for text in (",", "\n", " the")]


if __name__ == "__main__":
    raise SystemExit(main())
