"""Reinforcement learning in small: sample with the fast path, learn from the samples with gradients, sample again.

python examples/rollout_in_training.py [--model HUB_ID_OR_FOLDER]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = hf_fastattn.patch(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
inputs = tokenizer("She walked down to the river, and", return_tensors="pt").to(device)
prompt, comma = inputs.input_ids.shape[1], tokenizer(",").input_ids[-1]

rewards, fallbacks, kept = [], [], []
for _ in range(3):
    samples = model.generate(**inputs, do_sample=True, num_return_sequences=8, min_new_tokens=16, max_new_tokens=16)
    report = hf_fastattn.report(model)
    # A copy: the counters go on counting the forwards that follow, here that of the loss.
    fallbacks.append(dict(report.last_call.fallbacks))
    # In train mode no more than 128 MiB is kept between calls: the memory is there for the backward pass.
    kept.append(report.page_bytes_allocated)
    reward = (samples[:, prompt:] == comma).float().mean(dim=1)
    rewards.append(reward.mean().item())
    logits = model(samples).logits[:, prompt - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, samples[:, prompt:, None]).squeeze(-1)
    loss = -((reward - reward.mean())[:, None] * chosen).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"share of commas in the samples, step by step: {[round(reward, 3) for reward in rewards]}")
print(f"the rollouts' fallbacks: {fallbacks}, bytes kept after them: {kept}")
