"""ALiBi (Press et al., 2022) put under a model that was trained without it: a bias a head that grows with the distance.

python examples/alibi_retrofit.py [--model HUB_ID_OR_FOLDER]
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
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
inputs = tokenizer("The old house stood at the end of the lane, and nobody had lived in it since", return_tensors="pt").to(
    device
)
heads = model.config.num_attention_heads
# A tenth of the slopes that a model is trained with: this one has learned distances by its RoPE already.
slopes = 0.1 * 2 ** (-8 * (torch.arange(heads, device=device) + 1) / heads)


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


# Only layers of the lower half get it.
variant = hf_fastattn.Variant(score_mod=alibi)
half = model.config.num_hidden_layers // 2
hf_fastattn.patch(model, variant=lambda layer: variant if layer < half else None)
with_alibi = model.generate(**inputs, do_sample=False, max_new_tokens=24)
print(f"with ALiBi:    {tokenizer.decode(with_alibi[0])!r}")
print(hf_fastattn.report(model))

# Read at every step, recorded ones too: with slopes of zero the model is as it was.
slopes.zero_()
without = model.generate(**inputs, do_sample=False, max_new_tokens=24)
print(f"without ALiBi: {tokenizer.decode(without[0])!r}")
