"""A decode loop of your own over `torch.ops.hf_fastattn`: the layers of a Llama, pages and page tables by hand.

python examples/own_decode_loop.py [--model HUB_ID_OR_FOLDER, of a Llama]
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn.kernels.ops  # noqa: F401  registers torch.ops.hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

PAGE, STEPS = 16, 24
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
texts = ["def mean(values):\n    return ", "The river"]
prompts = [torch.tensor(ids, device=device) for ids in AutoTokenizer.from_pretrained(name)(texts).input_ids]

# Row b holds the pages b * columns to (b + 1) * columns - 1: page_table is [B, columns], a pool is [N, P, G, D].
columns = -(-(max(map(len, prompts)) + STEPS) // PAGE)
page_table = torch.arange(len(prompts) * columns, dtype=torch.int32, device=device).view(len(prompts), columns)
shape = (page_table.numel(), PAGE, model.config.num_key_value_heads, model.config.head_dim)
pools = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in model.model.layers]


def forward(new: list[Tensor], lengths: list[int]) -> Tensor:
    """Logits `[B, V]` after the last of the `new` tokens of every row, `lengths` counting these too."""
    rows = torch.cat([torch.full_like(ids, row) for row, ids in enumerate(new)])
    positions = torch.cat([torch.arange(n - len(ids), n, device=device) for ids, n in zip(new, lengths, strict=True)])
    slots = page_table[rows, positions // PAGE].long() * PAGE + positions % PAGE
    counts = torch.tensor([len(ids) for ids in new], dtype=torch.int32, device=device)
    cu_seqlens_q = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    x = model.model.embed_tokens(torch.cat(new))  # [T, hidden]: the rows are packed, there is no padding
    cos, sin = (table[0] for table in model.model.rotary_emb(x, positions[None]))
    for layer, (k_pages, v_pages) in zip(model.model.layers, pools, strict=True):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (-1, shape[-1])) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q = torch.ops.hf_fastattn.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots)
        out, _ = torch.ops.hf_fastattn.paged_attention(
            q, k_pages, v_pages, page_table, cu_seqlens_q, seq_lens, attention.scaling, max_query_len=max(map(len, new))
        )
        x = x + attention.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[cu_seqlens_q[1:].long() - 1]))


tokens = list(prompts)
with torch.no_grad():
    new = prompts
    for _ in range(STEPS):
        chosen = forward(new, [len(row) for row in tokens]).argmax(-1)
        new = list(chosen[:, None])
        tokens = [torch.cat(pair) for pair in zip(tokens, new, strict=True)]

for ids, row in zip(prompts, tokens, strict=True):
    stock = model.generate(ids[None], max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)[0]
    print(f"as generate(): {torch.equal(row, stock)}; {AutoTokenizer.from_pretrained(name).decode(row)!r}")
