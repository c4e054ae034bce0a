"""Whether tokens of a running batch are those that the model would have chosen: the check before any figure is shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.agreement import EXACT_TOKENS, STEPS, Verdict
from hf_fastattn.eval.accuracy.verdict import MAXIMUM_FACTOR
from hf_fastattn.eval.batching_calls.served import Served
from hf_fastattn.eval.models import in_precision, truth_dtype
from hf_fastattn.eval.parallel_calls.systems import GREEDY

# Requests that are looked at: those with the shortest and the longest prompts.
REQUESTS = 4


def check(stock: Any, served: Served) -> Verdict:
    """Compare some requests with stock, each by itself.

    In fp32 all tokens of a request have to be those of stock's `generate()`. In 16 bits each of the first tokens has to be
    the likeliest by the same weights in fp32, but for what errors can exchange that are twice as large as stock's own in
    these logits (FlashAttention's criterion; of two logits each may be off by so much).
    """
    places = sorted(served.outputs, key=lambda place: len(served.asks[place].prompt))
    places = list(dict.fromkeys([*places[: REQUESTS // 2], *places[-(REQUESTS // 2) :]]))
    if not places:
        return Verdict(False, "no request was done")
    if stock.dtype == torch.float32:
        return _same_tokens(stock, served, places)
    return _likeliest(stock, served, places)


def _same_tokens(stock: Any, served: Served, places: list[int]) -> Verdict:
    other = [place for place in places if _alone(stock, served, place) != served.outputs[place].generated_tokens]
    if other:
        return Verdict(False, f"the tokens of {len(other)} of {len(places)} requests are not stock's")
    return Verdict(True, f"all tokens of {len(places)} requests are those of stock's generate()")


def _alone(stock: Any, served: Served, place: int) -> list[int]:
    ask = served.asks[place]
    ids = torch.tensor([ask.prompt], device=stock.device)
    tokens: list[int] = stock.generate(ids, max_new_tokens=ask.new, **GREEDY)[0, len(ask.prompt) :].tolist()
    return tokens


def _likeliest(stock: Any, served: Served, places: list[int]) -> Verdict:
    # The exact model is slow.
    rows = [place for place in places if len(served.asks[place].prompt) <= EXACT_TOKENS]
    chosen = {place: served.outputs[place].generated_tokens[:STEPS] for place in rows}

    def logits(place: int) -> Tensor:
        tokens = [*served.asks[place].prompt, *chosen[place][:-1]]
        ids = torch.tensor([tokens], device=stock.device)
        found: Tensor = stock(ids, logits_to_keep=len(chosen[place]), use_cache=False).logits[0]
        return found

    with torch.no_grad(), in_precision(stock, truth_dtype(stock.dtype)):
        exact = {place: logits(place) for place in rows}
    with torch.no_grad():
        theirs = max((logits(place).to(exact[place].dtype) - exact[place]).abs().max().item() for place in rows)
    regret = 0.0
    for place in rows:
        tokens = torch.tensor(chosen[place], device=stock.device)[:, None]
        regret = max(regret, (exact[place].amax(-1) - exact[place].gather(-1, tokens)[:, 0]).max().item())
    allowed = 2 * MAXIMUM_FACTOR * theirs
    detail = f"first tokens of {len(rows)} requests miss the likeliest by {regret:.3g} (allowed {allowed:.3g})"
    return Verdict(regret <= allowed, detail)
