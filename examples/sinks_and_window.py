"""StreamingLLM's attention (Xiao et al., 2024): a query sees the first keys and those of a window, however long the text.

python examples/sinks_and_window.py [--first 4] [--window 64]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

parser = argparse.ArgumentParser()
parser.add_argument("--first", type=int, default=4, help="keys at the beginning that all queries see")
parser.add_argument("--window", type=int, default=64, help="last keys that a query sees")
arguments = parser.parse_args()
first, window = arguments.first, arguments.window

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(device)
inputs = tokenizer("The doctor was a careful man. " * 16, return_tensors="pt").to(device)


def sinks_and_window(b, h, q_idx, kv_idx):
    return (kv_idx < first) | (q_idx - kv_idx < window)


def perplexity(variant):
    with torch.no_grad(), hf_fastattn.patched(model, variant=variant):
        return model(**inputs, labels=inputs.input_ids, use_cache=False).loss.exp().item()


streaming = hf_fastattn.Variant(mask_mod=sinks_and_window)
for name, variant in (
    ("all keys", None),
    ("window alone", hf_fastattn.Variant(window=window)),
    ("first keys too", streaming),
):
    print(f"{name:>14}: perplexity {perplexity(variant):.3f}")

hf_fastattn.patch(model, variant=streaming)
tokens = model.generate(**inputs, do_sample=False, max_new_tokens=32)
print(f"{inputs.input_ids.shape[1]} tokens go on with {tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :])!r}")
