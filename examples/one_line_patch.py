"""One line makes this model's generate() fast, another takes it back.

python examples/one_line_patch.py [--model HUB_ID_OR_FOLDER]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
# In float32 the tokens are the same; in 16 bits rounding may exchange two that are nearly tied.
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
inputs = tokenizer("def mean(values):\n    return ", return_tensors="pt").to(device)
options = {"max_new_tokens": 32, "do_sample": False}

stock = model.generate(**inputs, **options)
hf_fastattn.patch(model)
fast = model.generate(**inputs, **options)

report = hf_fastattn.report(model)
print(tokenizer.decode(fast[0]))
print(f"\nthe same tokens as before: {torch.equal(stock, fast)}\n{report}")

hf_fastattn.unpatch(model)
after = hf_fastattn.report(model)
print(after)
