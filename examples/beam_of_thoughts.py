"""A beam of thoughts (Yao et al., 2023, "Tree of Thoughts"): thoughts are drawn, judged from forks, and the best go on.

python examples/beam_of_thoughts.py [--model HUB_ID_OR_FOLDER]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.transformers_version import CACHE

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = hf_fastattn.patch(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device))
WIDTH, THOUGHTS, DEPTH, TOKENS = 2, 3, 3, 8

texts = tokenizer("There were three ways to reach the town.", return_tensors="pt").input_ids.to(device)
judge = tokenizer(" And this was", add_special_tokens=False, return_tensors="pt").input_ids.to(device)
good = tokenizer(" true", add_special_tokens=False).input_ids[0]
beam = hf_fastattn.PagedCache(model.config)
hf_fastattn.append(model, beam, texts[:, :-1])
kept, pages = [], []
for _ in range(DEPTH):
    parents = [row for row in range(len(texts)) for _ in range(THOUGHTS)]
    drawn = hf_fastattn.fork(beam, parents)
    options = {"max_new_tokens": TOKENS, "do_sample": True, "top_k": 20}
    texts = model.generate(texts[parents], **{CACHE: drawn}, **options)
    # Judged in a fork of its own, which is thrown away: the thoughts go on without the question.
    aside = hf_fastattn.fork(drawn, range(len(texts)))
    asked = torch.cat((texts[:, -1:], judge.expand(len(texts), -1)), 1)
    scores = hf_fastattn.append(model, aside, asked)[:, -1].log_softmax(-1)[:, good]
    pages.append(hf_fastattn.report(model).pages_in_use)
    best = scores.topk(WIDTH).indices
    kept.append(scores[best].tolist())
    for cache in (aside, beam):
        cache.reset()
    beam, texts = hf_fastattn.fork(drawn, best), texts[best]
    drawn.reset()

for score, text in zip(kept[-1], texts, strict=True):
    print(f"{score:6.2f} | {tokenizer.decode(text, skip_special_tokens=True)!r}")
print(f"pages in use, depth by depth: {pages}; tokens of each row at the end: {beam.get_seq_length()}")
beam.reset()
