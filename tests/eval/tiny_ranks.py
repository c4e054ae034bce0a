"""The benchmark of ranks on tiny shapes, as torchrun starts it: `python tiny_ranks.py FAMILY OPTIONS`."""

from __future__ import annotations

import sys

from hf_fastattn.eval import speed
from hf_fastattn.eval.choices import SHAPES

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
TINY = {
    "llama-3-8b": {"hidden_size": 64, "intermediate_size": 96},
    "qwen3-30b-a3b": {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}

if __name__ == "__main__":
    for name, sizes in TINY.items():
        SHAPES[name] = {**SHAPES[name], **SIZES, **sizes}
    raise SystemExit(speed.main(sys.argv[1:]))
