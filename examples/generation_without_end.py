"""A stream of text in constant memory (Xiao et al., 2023, "StreamingLLM"): rows keep their first and their last tokens.

python examples/generation_without_end.py [--new 6000] [--window 256]

It goes on past all positions that the model knows: keys have the positions of their places in the cache.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_fastattn
from hf_fastattn import Streaming
from hf_fastattn.eval.choices import SHIPPED

parser = argparse.ArgumentParser()
parser.add_argument("--new", type=int, default=6000, help="tokens to generate; stop earlier with Ctrl-C")
parser.add_argument("--window", type=int, default=256, help="last tokens that are seen at least")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(device)
inputs = tokenizer("The doctor was a careful man. He", return_tensors="pt").to(device)

hf_fastattn.patch(model, streaming=Streaming(sinks=4, window=arguments.window))
held = []


class Watch(TextStreamer):
    """Prints, and looks at how many pages are held."""

    def put(self, value):
        super().put(value)
        held.append(hf_fastattn.report(model).pages_in_use)


torch.manual_seed(0)
try:
    tokens = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=arguments.new, eos_token_id=None, streamer=Watch(tokenizer)
    )
except KeyboardInterrupt:
    print("\nstopped")
print(f"{len(held) - 1} tokens were generated; never more than {max(held)} pages of 16 tokens were held")
