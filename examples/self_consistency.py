"""Self-consistency (Wang et al., 2022): many ways to an answer are drawn over one prompt, and the answers vote.

python examples/self_consistency.py [--model HUB_ID_OR_FOLDER]
"""

import argparse
from collections import Counter

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
question = "Two and two are four. Three and three are six. Four and four are"
prompt = tokenizer(question, return_tensors="pt").input_ids.to(device)
WAYS, THOUGHT = 8, 12

ways = model.generate(
    prompt, num_return_sequences=WAYS, do_sample=True, max_new_tokens=THOUGHT, return_dict_in_generate=True
)
cache = ways[CACHE]

# Each way goes on from its own pages to an answer; its last token has been drawn, and not computed.
ask = tokenizer(" So the answer is", add_special_tokens=False, return_tensors="pt").input_ids.to(device)
asked = torch.cat((ways.sequences[:, -1:], ask.expand(WAYS, -1)), 1)
answers = hf_fastattn.append(model, cache, asked)[:, -1].argmax(-1)

votes = Counter(tokenizer.decode(answer) for answer in answers)
for answer, count in votes.most_common():
    print(f"{count} of {WAYS} | {answer!r}")
winner = votes.most_common(1)[0][0]
print(f"pages of {WAYS} ways: {hf_fastattn.report(model).pages_in_use}; tokens of each: {cache.get_seq_length()}")
cache.reset()
