"""Best of n: the continuations of one prompt are drawn from one cache, and a scorer reads them from forks of it.

python examples/best_of_n.py [--model HUB_ID_OR_FOLDER]
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
prompt = tokenizer("It was the doctor who spoke first, and what he said was", return_tensors="pt").input_ids.to(device)
SAMPLES, NEW = 6, 16

# All but the last token, which generate() computes: its logits are the first that are drawn from.
trunk = hf_fastattn.PagedCache(model.config)
hf_fastattn.append(model, trunk, prompt[:, :-1])

drawn = hf_fastattn.fork(trunk, [0] * SAMPLES)
texts = model.generate(prompt.repeat(SAMPLES, 1), **{CACHE: drawn}, max_new_tokens=NEW, do_sample=True, top_k=20)
computed = hf_fastattn.report(model).last_call.prompt_tokens

# The scorer: how likely the model itself finds what follows the prompt, read once more from the prompt's own pages. Any
# other one, such as a question at the end of each text, works on forks in the same way.
again = hf_fastattn.fork(trunk, [0] * SAMPLES)
logits = hf_fastattn.append(model, again, texts[:, prompt.shape[1] - 1 : -1], logits_to_keep=0)
new = texts[:, prompt.shape[1] :]
scores = logits.log_softmax(-1).gather(2, new[..., None])[..., 0].mean(1)

for score, text in sorted(zip(scores.tolist(), new, strict=True), reverse=True, key=lambda pair: pair[0]):
    print(f"{score:6.2f} | {tokenizer.decode(text, skip_special_tokens=True)!r}")
print(f"prompt tokens that generate() computed: {computed}, one a sample")
for cache in (trunk, drawn, again):
    cache.reset()
