"""Attention with a learned bias for each head and distance (as T5's), fitted to a text by forwards alone."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

device, buckets = "cuda" if torch.cuda.is_available() else "cpu", 12
model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(device)
text = "A river runs past the mill. The mill has a wheel, the wheel has a miller, and the miller has a cat. " * 3
ids = AutoTokenizer.from_pretrained(SHIPPED)(text, return_tensors="pt").input_ids.to(device)
table = torch.zeros(model.config.num_attention_heads, buckets, device=device)


def distance_bias(score, b, h, q_idx, kv_idx):
    # Near keys have a bucket each, others share one by the logarithm of their distance.
    bucket = 2 * torch.log2((q_idx - kv_idx + 1).float())
    return score + table[h, bucket.clamp(max=buckets - 1).to(torch.int32)]


hf_fastattn.patch(model, variant=hf_fastattn.Variant(score_mod=distance_bias))


@torch.no_grad()
def loss(change=0.0):
    table.add_(change)
    value = model(ids, labels=ids, use_cache=False).loss.item()
    table.sub_(change)
    return value


# Steps along random directions (Spall, 1992), those that lower the loss: the kernels give no gradients.
torch.manual_seed(0)
losses = [loss()]
for _ in range(20):
    direction = torch.sign(torch.randn_like(table))
    step = -0.3 * direction * min(max((loss(0.05 * direction) - loss(-0.05 * direction)) / 0.1, -1), 1)
    table.add_(step if loss(step) < losses[-1] else 0.0)
    losses.append(loss())
print(f"loss a token: {losses[0]:.3f} with the model's own attention, {losses[-1]:.3f} with the bias")
