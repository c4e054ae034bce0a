"""What options of the command can name: plain data, apart from the code it is for, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent / "checkpoint" / "weights"
# A small mixture of experts, which is not in a wheel.
MIXTURE = SHIPPED.parent / "mixture"
DTYPES = ("float32", "bfloat16", "float16")
# What `FastAttnConfig.kv_dtype` can be.
KV_DTYPES = ("fp8", "int8")

# The faults that faults.py can plant.
FAULTS = ("page", "position", "mask", "scale", "window")
# Those that take a mixture of experts, whose weights the router makes add up to 1.
ROUTING_FAULTS = ("expert", "weights")
# Those that step_faults.py plants in what recorded steps of the device's loop read.
STEP_FAULTS = {
    "step-page": "two rows have exchanged an entry of their page tables, a row alone has an old one",
    "step-slot": "keys and values are written one slot further on",
    "step-scale": "scores are multiplied by 1.03",
    "step-length": "rows are read as if they were one key shorter",
    "step-rope": "a row is turned by the angles of its first step, in all steps",
    "step-sampler": "half as many tokens again may be drawn",
    "step-expert": "the second of a token's experts is taken for the first, and the first for the second",
    "step-prefix": "the first group of rows that share a prefix has one row too many",
    "step-suffix": "the first group's prefix is a page too long, so that its rows' own tokens begin a page late",
}
# Of these what is read by rows that share a prefix alone.
SHARING_FAULTS = ("step-prefix", "step-suffix")

# The evaluations that faults are held against.
EVALUATED = ("perplexity", "parity", "logprobs")
# Those that run together.
TOGETHER = (*EVALUATED, "recall", "sampling", "tasks", "streaming", "faults")
# Their sizes where all of them run together, and where they only have a quick look. In float32 the quietest of the faults,
# scores times 1.03, is a million times a limit of mean squares on four windows: one of 1.00003 would be noticed.
WHOLE = {
    "perplexity": ("--windows", "8", "--context", "160", "--stride", "40"),
    "parity": ("--windows", "8", "--context", "160", "--stride", "40"),
    "logprobs": ("--windows", "6", "--new", "16"),
    "recall": ("--lengths", "256", "768", "--count", "3"),
    "sampling": ("--samples", "16", "--calls", "2"),
    "tasks": ("--limit", "6"),
    "streaming": ("--tokens", "3000", "--window", "384", "--places", "32", "--new", "64"),
    "faults": (
        *("--context", "64", "--stride", "24", "--windows", "4", "--append", "12", "--piece", "5", "--decode", "6"),
        *("--seeds", "1", "--faults", "page", "mask", "scale", "step-page", "step-slot", "step-length", "step-rope"),
    ),
}
SMALL = (
    *("--context", "96", "--stride", "24", "--windows", "4", "--batch", "4"),
    *("--append", "12", "--piece", "5", "--decode", "6"),
)
QUICK = {
    "perplexity": SMALL,
    "parity": (*SMALL, "--new", "6"),
    "logprobs": (*SMALL, "--new", "6", "--samples", "3"),
    "recall": ("--lengths", "160", "256", "--depths", "0", "0.6", "--count", "2"),
    "sampling": ("--prompts", "2", "--samples", "16", "--new", "5", "--calls", "2", "--length", "9"),
    "tasks": ("--limit", "2", "--num-fewshot", "1"),
    "streaming": ("--tokens", "1200", "--window", "192", "--places", "24", "--new", "16"),
    "faults": (
        *("--context", "64", "--stride", "24", "--windows", "2", "--append", "12", "--piece", "5", "--decode", "6"),
        *("--seeds", "0", "--faults", "mask", "step-slot"),
    ),
}

# The recall tasks that the shipped checkpoint was trained for; the first three are what `eval recall` asks.
RECALLED = ("needle", "lookup", "variable", "copy")

# Options of draws that are tested, each alone and all together; `ends` has rows that end early.
SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.08},
    "penalty": {"repetition_penalty": 1.25},
    "together": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "ends": {"temperature": 0.9, "top_k": 50},
}
SAMPLING_FAULTS = ("threshold", "twins")

# Those that take keys and values of 8 bits.
FORMAT_FAULTS = ("kv_scale",)

# The kinds of calls that the `generate()` benchmark knows.
KINDS = {
    "greedy": "each row its own prompt",
    "sampling": "the same with top-k 50 and top-p 0.9",
    "callbacks": "greedy with a user's logits processor, stopping criterion and streamer",
    "samples": "all rows are samples of one prompt, top-k 50",
    "drafts": "greedy with prompt lookup of 8 tokens, a prompt that repeats itself; a batch of 1, as Transformers wants it",
    "finished": "greedy rows that end one after the other; `stays`: patched, with ended rows left in the batch (CUDA only)",
    "early": "the same, but most rows end early: at lengths in geometric progression from SHORTEST new tokens",
}

# The kinds of calls whose rows begin alike.
PARALLEL = ("samples", "fours", "questions", "groups", "nested", "turns")

# The cases of the batching benchmark, and the ways to serve requests that are all there at once.
BATCHING = {
    "ragged": "64 ragged prompts, 128 new tokens each",
    "outputs": "the same prompts, outputs of 16 to 512 tokens",
    "mixed": "512 requests, outputs log-uniform from 16 to 1,024 tokens",
    "long": "32 requests of 8k new tokens",
    "arrival": "a long prompt that arrives while 64 rows decode",
    "load": "requests that arrive at random, at several rates",
}
SERVED = ("stock_batch", "stock_padded", "patched_padded", "rows_kept", "ours")

# What GRPO's rollouts run on: TRL's default with and without checkpointing, 16-bit weights, LoRA on both.
ROLLOUTS = (
    "fp32+accelerate+train",
    "fp32+accelerate+train+checkpointing",
    "bf16+train+checkpointing",
    "bf16+train+lora",
    "fp32+accelerate+train+lora",
)

QWEN35_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}

# The configuration that the name stands for, as published; weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        # Half of its layers: the check of agreement holds all weights in fp32.
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen2-moe-14b-a2.7b": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "max_position_embeddings": 262144,
        "rope_parameters": QWEN35_ROPE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3.5-4b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "max_position_embeddings": 262144,
        "rope_parameters": QWEN35_ROPE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        # A quarter of its layers: all of them do not fit.
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}

# Those with experts, and where the benchmark of these sends its tokens: anywhere, by Zipf's law, all to the same experts.
MIXTURES = tuple(name for name, shape in SHAPES.items() if "num_experts_per_tok" in shape)
ROUTINGS = ("uniform", "zipf", "one")
# Lines of `bench attention --variants`; what each is: `kernel_speed/variant_cases.py`.
VARIANTS = (
    *("plain", "window 1024", "sinks and window", "chunked", "documents", "prefix-LM", "dilated", "block-sparse"),
    *("softcap", "alibi", "bias table", "sinks", "sigmoid", "RoPE inside"),
)

# Windows of a run that plants faults. In 16 bits the scale fault is little more than rounding: the limits must be known
# well to tell them apart.
WINDOWS_32, WINDOWS_16 = 8, 48
