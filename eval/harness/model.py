"""`FastLM`: lm-evaluation-harness's `HFLM` on a patched model, as `--model hf-fastattn`.

    hf-fastattn lm-eval --model hf-fastattn --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks hellaswag

It takes what `HFLM` takes, and registers itself when this module is imported, for `lm_eval.simple_evaluate`. Requests of
log-likelihoods are scored by `PrefixScorer`, those of texts join and leave one running batch; what these do not serve
runs `HFLM`'s own way, counted with its reason in `FastLM.stock_ways`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import ContinuousBatchingConfig

from hf_fastattn.batching.choice import choice_of
from hf_fastattn.eval.harness.answers import batched_answers
from hf_fastattn.eval.harness.scorer import (
    AUTO_TOKENS,
    LEAST_TOKENS,
    OUT_OF_MEMORY,
    Continuation,
    Counts,
    PrefixScorer,
    why_not_scored,
)
from hf_fastattn.patching import find_model, patch

logger = logging.getLogger("hf_fastattn")

# Options of a request for text that a running batch understands.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LENGTHS}
# Requests that are looked at for common prefixes at a time; answers are kept after each such portion.
PORTION = 8192
# By how much less is computed at a time where memory runs out.
SMALLER = 4

Asked = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("hf-fastattn")
class FastLM(HFLM):  # type: ignore[misc]
    """An `HFLM` whose model is patched.

    Args:
        pretrained: as of `HFLM`; a model that was loaded before is patched too, and stays so.
        patch_options: options of `hf_fastattn.patch`.

    Attributes:
        stock_ways: requests that ran `HFLM`'s own way, by reason.
        counts: tokens of the log-likelihoods: asked for, distinct, computed.
    """

    def __init__(self, pretrained: Any, patch_options: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(pretrained, **options)
        self.stock_ways: Counter[str] = Counter()
        self.counts = Counts()
        self._why_not_patched: str | None = None
        try:
            patch(self.model, **(patch_options or {}))
        except (TypeError, ValueError) as error:
            self._why_not_patched = f"the model cannot be patched: {error}"
            logger.warning("hf_fastattn: lm-evaluation-harness runs as ever: %s", self._why_not_patched)

    @property
    def is_patched(self) -> bool:
        """Whether the model could be patched."""
        return self._why_not_patched is None

    # ---- log-likelihoods --------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Asked], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        reason = self._why_not_scored(requests)
        if reason is None:
            answers = self._scored(requests, disable_tqdm, override_bs)
            if answers is not None:
                return answers
            reason = "memory does not suffice for the longest request on pages"
        self._note(reason, len(requests))
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _why_not_scored(self, requests: Sequence[Asked]) -> str | None:
        if self._why_not_patched is not None:
            return self._why_not_patched
        if self.backend != "causal":
            return "the model has an encoder"
        if self.mixed_precision_dtype is not None:
            return "mixed_precision_dtype is set"
        if not all(context and 0 < len(targets) <= self.max_length for _, context, targets in requests):
            return "a request has no tokens, or more than the model takes"
        return why_not_scored(self.model)

    def _scored(self, requests: Sequence[Asked], quiet: bool, override_bs: int | None) -> list[tuple[float, bool]] | None:
        """Answers in the order of the requests; None if there is no memory even for one row at a time."""
        asked = []
        for _, context, targets in requests:
            kept = (context + targets)[-(self.max_length + 1) :]
            asked.append(Continuation(tuple(kept[: len(kept) - len(targets)]), tuple(targets)))
        longest = max((len(one.read) for one in asked), default=1)
        size = override_bs or self.batch_size
        most = AUTO_TOKENS if size == "auto" else max(LEAST_TOKENS, size * longest)
        answers: list[tuple[float, bool]] = []
        hidden = quiet or self.rank != 0
        with tqdm(total=len(asked), disable=hidden, desc="Running loglikelihood requests") as bar:
            scorer = PrefixScorer(self.model, self.softmax_dtype, most, counts=self.counts, on_scored=bar.update)
            while len(answers) < len(asked):
                try:
                    found = scorer.score(asked[len(answers) : len(answers) + PORTION])
                except OUT_OF_MEMORY:
                    if scorer.most_tokens <= longest:
                        return None
                    scorer.most_tokens = max(scorer.most_tokens // SMALLER, longest)
                    continue
                for (texts, _, _), answer in zip(requests[len(answers) :], found, strict=False):
                    if texts is not None:
                        # Parts of a rolling log-likelihood have none.
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers += found
        return answers

    # ---- texts ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`'s, all requests with the same options in one running batch."""
        reasons = [self._why_not_batched(request.args[1]) for request in requests]
        answers: dict[int, str] = {}
        for batched in (True, False):
            places = [place for place, reason in enumerate(reasons) if (reason is None) == batched]
            if not places:
                continue
            size: Any = self.batch_size
            self._batches = batched
            try:
                if batched:
                    self.batch_size_per_gpu = len(places)
                found = super().generate_until([requests[place] for place in places], disable_tqdm=disable_tqdm)
            finally:
                self._batches = False
                self.batch_size_per_gpu = size
            answers.update(zip(places, found, strict=True))
        for reason in reasons:
            if reason is not None:
                self._note(reason, 1)
        return [answers[place] for place in range(len(requests))]

    _batches = False

    def _why_not_batched(self, asked: Any) -> str | None:
        if self._why_not_patched is not None:
            return self._why_not_patched
        if self.backend != "causal":
            return "the model has an encoder"
        if self.mixed_precision_dtype is not None:
            return "mixed_precision_dtype is set"
        if not isinstance(asked, dict) or not KNOWN.issuperset(asked):
            return f"a running batch does not know {', '.join(sorted(set(asked) - KNOWN))}"
        if asked.get("do_sample") and not asked.get("temperature", 0.0):
            return "do_sample is set without a temperature"
        if find_model(self.model) is not self.model:
            return "the model is wrapped"
        options = {name: value for name, value in asked.items() if name not in ("until", *LENGTHS)}
        choice = choice_of(self.model, self._generation_config(options), ContinuousBatchingConfig())
        return choice if isinstance(choice, str) else None

    def _generation_config(self, options: dict[str, Any]) -> Any:
        """The model's, with a request's options as `HFLM` takes them."""
        temperature = options.get("temperature", 0.0)
        drawn = bool(options.get("do_sample", temperature > 0))
        config = copy.deepcopy(self.model.generation_config)
        kept = {name: value for name, value in options.items() if name not in ("do_sample", "temperature")}
        config.update(do_sample=drawn, pad_token_id=self.tokenizer.pad_token_id, **kept)
        if drawn:
            config.temperature = temperature
        return config

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        if not self._batches:
            return super()._model_generate(context, max_length, stop, **options)
        mask = options.pop("attention_mask")
        width = context.shape[1]
        prompts = [tokens[shown].tolist() for tokens, shown in zip(context, mask.bool(), strict=True)]
        answers = batched_answers(
            self.model,
            self._generation_config(options),
            prompts,
            max_length - width,
            stop,
            lambda text: self.tok_encode(text, add_special_tokens=False),
            lambda tokens: self.tok_decode(tokens, skip_special_tokens=False),
        )
        found = torch.full((len(context), max_length), self.tokenizer.pad_token_id, device="cpu")
        found[:, :width] = context.cpu()
        for row, tokens in enumerate(answers):
            found[row, width : width + len(tokens)] = torch.tensor(tokens, device="cpu")
        return found

    def _note(self, reason: str, requests: int) -> None:
        if reason not in self.stock_ways:
            logger.info("hf_fastattn: lm-evaluation-harness runs as ever: %s", reason)
        self.stock_ways[reason] += requests
