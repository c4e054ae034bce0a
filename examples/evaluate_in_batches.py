"""lm-evaluation-harness on a patched model: common beginnings are computed once, and texts share one running batch.

python examples/evaluate_in_batches.py [--model HUB_ID_OR_FOLDER]

On the command line: `hf-fastattn lm-eval --model hf-fastattn --model_args pretrained=... --tasks ...`.
"""

import argparse

import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.eval.harness.model import FastLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
# It patches the model; `lm_eval.simple_evaluate(model=lm, tasks=[...])` takes it too.
lm = FastLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(name), batch_size=8)
texts = ["def add(a, b):\n", "import os\nimport", "class Queue:\n    def __init__(self):\n", "for line in open(path):\n"]
texts += [f"She had {count} apples, and" for count in range(2, 10)]
asked = {"until": ["\n", ". "], "max_gen_toks": 32}
requests = [Instance("generate_until", {}, (text, asked), place) for place, text in enumerate(texts)]
answers = lm.generate_until(requests)
call = hf_fastattn.report(model).last_call
print(*map(repr, answers), f"{len(requests)} requests in {call.batch_steps} steps", sep="\n")

choices = [" apples", " pears and a basket", " pears and a box", " a long walk home in the rain"]
scored = [Instance("loglikelihood", {}, (texts[5], choice), place) for place, choice in enumerate(choices)]
likelihoods = lm.loglikelihood(scored)
print(*likelihoods, f"{lm.counts.computed} tokens computed of {lm.counts.asked}", sep="\n")
