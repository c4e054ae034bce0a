"""A chat of several turns over one `PagedCache`: each turn computes only what is new.

python examples/chat.py [--model HUB_ID_OR_FOLDER]
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

messages = ["A: Where do you live?\nB:", "\nA: And who lives next door?\nB:", "\nA: What is the weather like?\nB:"]
cache = hf_fastattn.PagedCache(model.config)
history = torch.empty(1, 0, dtype=torch.long, device=device)
computed = []
for message in messages:
    # Only the first one begins with the token that begins a text.
    new = tokenizer(message, add_special_tokens=not computed, return_tensors="pt").input_ids.to(device)
    history = torch.cat((history, new), dim=1)
    # The whole history goes in, and what the cache holds of it is skipped. The argument is called `cache` from
    # Transformers 5.24 on, and `past_key_values` before; CACHE is the name that the installed one knows.
    history = model.generate(history, **{CACHE: cache}, max_new_tokens=16, do_sample=False)
    computed.append(hf_fastattn.report(model).last_call.prompt_tokens)

print(tokenizer.decode(history[0], skip_special_tokens=True))
print(f"prompt tokens computed, turn by turn: {computed}; tokens in the cache: {cache.get_seq_length()}")
print(f"pages in use: {hf_fastattn.report(model).pages_in_use}")
cache.reset()
print(f"pages in use after cache.reset(): {hf_fastattn.report(model).pages_in_use}")
