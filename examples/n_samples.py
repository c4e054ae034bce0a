"""Eight samples of one prompt: it is computed once, and all samples read the same pages of keys and values.

python examples/n_samples.py [--model HUB_ID_OR_FOLDER]
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
model = hf_fastattn.patch(AutoModelForCausalLM.from_pretrained(name).to(device))
text = """The old house stood at the end of the lane, and nobody had lived in it since the spring. On the first day of
October the doctor saw a light in one of the upper windows. He was a careful man, who believed in nothing that he had
not seen twice, and so he walked home, ate his supper, and came back with a lantern. The light was still there. He
knocked, and waited, and knocked again; then"""
inputs = tokenizer(text, return_tensors="pt").to(device)

samples = 8
tokens = model.generate(**inputs, do_sample=True, num_return_sequences=samples, max_new_tokens=16)

prompt = inputs.input_ids.shape[1]
for row in tokens[:, prompt:]:
    print("|", tokenizer.decode(row, skip_special_tokens=True).replace("\n", " "))

call = hf_fastattn.report(model).last_call
print(f"prompt tokens computed: {call.prompt_tokens}; without sharing: {samples * prompt}")
print(f"pages: {call.pages_allocated} allocated, {call.pages_shared} shared, {call.pages_copied} copied before a write")
