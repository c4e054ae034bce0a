"""A decode loop of your own over `torch.ops.hf_fastattn`: the layers of a Llama, with pages and tables by hand.

python examples/own_decode_loop.py [--model HUB_ID_OR_FOLDER, of a Llama]
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.kernels import ops  # the same as torch.ops.hf_fastattn, which this import registers

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

PAGE, STEPS = 16, 24
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
decoder = model.to(device).model
prompts = tokenizer(["def mean(values):\n    return ", "The river"]).input_ids

# Row b owns `columns` pages side by side; each layer has pages [N, P, G, D] of keys and of values.
rows, columns = len(prompts), -(-(max(map(len, prompts)) + STEPS) // PAGE)
page_table = torch.arange(rows * columns, device=device).view(rows, columns)
shape = (rows * columns, PAGE, model.config.num_key_value_heads, model.config.head_dim)
pages = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in decoder.layers]


def step(ids: Tensor, counts: Tensor, seq_lens: Tensor) -> Tensor:
    """The next token of every row, from packed new tokens `ids`, `counts[b]` of row b, which then has `seq_lens[b]`."""
    ends = counts.cumsum(0)
    row = torch.arange(rows, device=device).repeat_interleave(counts)
    positions = torch.arange(len(ids), device=device) - ends[row] + seq_lens[row]
    slots = page_table[row, positions // PAGE] * PAGE + positions % PAGE
    batch = (page_table.int(), torch.nn.functional.pad(ends, (1, 0)).int(), seq_lens.int())
    longest = int(counts.max())  # not given, every layer would wait for the device to ask
    x = decoder.embed_tokens(ids)
    cos, sin = (table[0] for table in decoder.rotary_emb(x, positions[None]))
    for layer, (k_pages, v_pages) in zip(decoder.layers, pages, strict=True):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (-1, shape[-1])) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q = ops.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots)
        out, _ = ops.paged_attention(q, k_pages, v_pages, *batch, attention.scaling, max_query_len=longest)
        x = x + attention.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x[ends - 1])).argmax(-1)


counts = torch.tensor([len(ids) for ids in prompts], device=device)
ids, seq_lens, tokens = torch.tensor(sum(prompts, []), device=device), counts, []
with torch.no_grad():
    for _ in range(STEPS):
        ids = step(ids, counts, seq_lens)
        tokens.append(ids)
        counts, seq_lens = torch.ones_like(counts), seq_lens + 1

for prompt, new in zip(prompts, torch.stack(tokens, 1).tolist(), strict=True):
    print("|", tokenizer.decode(prompt + new))
