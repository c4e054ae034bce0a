"""The kernels alone, for a family that `patch` does not know: a tiny Gemma 2, or any model that calls Transformers'
attention interface. On a CPU so small a model runs Transformers' attention, which the counters say.

python examples/attn_implementation.py [--model HUB_ID_OR_FOLDER]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, Gemma2Config, GenerationConfig

import hf_fastattn
from hf_fastattn.interface import counters

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: a Gemma 2 of three layers with random weights")
name = parser.parse_args().model

hf_fastattn.register()
if name:
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
else:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=24, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

prompt = torch.arange(3, 40, device=model.device)[None]
fast = model.generate(prompt, max_new_tokens=24, do_sample=False)
print(f"calls of our kernels: {dict(counters.kernels)}; of Transformers' attention: {dict(counters.fallbacks)}")

greedy = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=-1)
batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
requests = [prompt[0, :count].tolist() for count in (5, 20, 37)]
model.generate_batch(requests, generation_config=greedy, continuous_batching_config=batching)
print(f"forwards of Transformers' generate_batch: {dict(counters.batches)}")

model.set_attn_implementation("eager")
stock = model.generate(prompt, max_new_tokens=24, do_sample=False)
print(f"the same tokens with Transformers' own attention: {torch.equal(fast, stock)}")
