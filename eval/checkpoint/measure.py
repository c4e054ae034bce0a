"""Measure the checkpoint: held-out perplexity, recall by length and depth, continuations.

`python -m hf_fastattn.eval.checkpoint.measure --lengths 512 2000 --count 8` measures the shipped weights as they are.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_fastattn.eval.checkpoint.recall import TASKS, RecallPrompt, heldout_documents, recall_prompts

WEIGHTS = Path(__file__).with_name("weights")
LENGTHS = (512, 1024, 2048, 3072, 3500)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
OPENINGS = (
    "It was a truth which every young lady in the neighbourhood had",
    "And the LORD spake unto",
    "The :mod:`json` module can be used to",
    "def read_lines(path):\n    ",
)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int = 4096) -> dict[str, object]:
    """Held-out loss per token (nats) and perplexity, in all and per kind, with standard errors over the blocks.

    A block is a held-out document, cut at `context` tokens; each block starts anew with bos.
    """
    losses: list[tuple[str, float, int]] = []
    for document in heldout_documents():
        tokens = tokenizer.encode(document["text"], add_special_tokens=False, verbose=False)
        for start in range(0, len(tokens), context - 1):
            block = [tokenizer.bos_token_id, *tokens[start : start + context - 1]]
            ids = torch.tensor([block], device=model.device)
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            losses.append((document["kind"], cross_entropy(logits, ids[0, 1:], reduction="sum").item(), len(block) - 1))
    kinds = sorted({kind for kind, _, _ in losses})
    parts = {kind: summarise([(loss, count) for name, loss, count in losses if name == kind]) for kind in kinds}
    return {**summarise([(loss, count) for _, loss, count in losses]), "kinds": parts}


def summarise(blocks: list[tuple[float, int]]) -> dict[str, float]:
    """Mean loss per token over `(summed loss, tokens)` blocks, perplexity, and their standard errors (ratio estimate)."""
    loss, count = (np.array(column, dtype=np.float64) for column in zip(*blocks, strict=True))
    mean = loss.sum() / count.sum()
    spread = math.sqrt(((loss - mean * count) ** 2).sum() * len(count) / max(len(count) - 1, 1)) / count.sum()
    ppl = math.exp(mean)
    figures = {"loss": mean, "loss_se": spread, "perplexity": ppl, "perplexity_se": ppl * spread}
    return {name: round(float(figure), 4) for name, figure in figures.items()} | {
        "tokens": int(count.sum()),
        "blocks": len(count),
    }


@torch.inference_mode()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    count: int = 100,
    seed: int = 0,
) -> dict[str, dict[int, dict[float, float]]]:
    """Share of prompts whose whole answer is greedy-decoded right: `result[task][length][depth]`."""
    return {
        task: {
            length: {
                depth: exact_share(model, recall_prompts(tokenizer, task, length, depth, count, seed)) for depth in depths
            }
            for length in lengths
        }
        for task in tasks
    }


def exact_share(model: PreTrainedModel, prompts: list[RecallPrompt], batch_tokens: int = 65_536) -> float:
    """Share of prompts whose every answer token is the arg max, given those before it: what greedy decoding would emit."""
    size, right = max(1, batch_tokens // len(prompts[0].prompt)), 0
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        answers = torch.tensor([row.answer for row in rows], device=model.device)
        ids = torch.tensor([row.prompt + row.answer for row in rows], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=answers.shape[1] + 1).logits[:, :-1]
        right += int((logits.argmax(-1) == answers).all(-1).sum())
    return right / len(prompts)


@torch.inference_mode()
def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int = 60, seed: int = 0) -> list[str]:
    """What the model writes after each of `OPENINGS`, sampled at temperature 0.7 from the 40 likeliest tokens."""
    torch.manual_seed(seed)
    texts = []
    for opening in OPENINGS:
        ids = tokenizer(opening, return_tensors="pt").input_ids.to(model.device)
        output = model.generate(ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def main() -> None:
    """Print perplexity, recall and continuations of a checkpoint as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--depths", type=float, nargs="+", default=DEPTHS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.weights)
    model = AutoModelForCausalLM.from_pretrained(arguments.weights, dtype=torch.bfloat16).to(arguments.device).eval()
    for text in continuations(model, tokenizer):
        print(json.dumps({"continuation": text}))
    print(json.dumps({"perplexity": perplexity(model, tokenizer)}))
    table = recall(model, tokenizer, arguments.tasks, arguments.lengths, arguments.depths, arguments.count)
    print(json.dumps({"recall": table, "prompts_each": arguments.count}))


if __name__ == "__main__":
    main()
