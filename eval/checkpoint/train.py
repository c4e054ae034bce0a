"""Train the checkpoint: `python -m hf_fastattn.eval.checkpoint.train` (data first: `...checkpoint.data`).

Plain PyTorch, seeded by (seed, step), resumable with `--state`. Writes bf16 weights and a log of JSON lines, then measures
the weights that it wrote.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_fastattn.eval.checkpoint.data import CONTEXT, TOKENS
from hf_fastattn.eval.checkpoint.measure import WEIGHTS, continuations, perplexity, recall
from hf_fastattn.eval.checkpoint.recall import RecallVocabulary
from hf_fastattn.eval.checkpoint.rows import Batches

QUICK_LENGTHS, QUICK_DEPTHS = (512, 3500), (0.1, 0.9)
# What the loss that keeps all experts in use is multiplied by.
BALANCE = 0.01


def build_model(vocabulary: int, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """A Llama of 7 million parameters with grouped-query attention: 8 query heads, 2 key/value heads."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        **_common(vocabulary, bos, eos, pad),
    )
    return scaled(LlamaForCausalLM(config))


def build_mixture(vocabulary: int, bos: int, eos: int, pad: int) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of 2 million parameters: 8 experts in each of 3 layers, of which a token takes 2."""
    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_common(vocabulary, bos, eos, pad),
    )
    return scaled(Qwen3MoeForCausalLM(config))


def _common(vocabulary: int, bos: int, eos: int, pad: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "attn_implementation": "sdpa",
    }


def scaled(model: PreTrainedModel) -> Any:
    """`model` with what adds to the residual stream made smaller, the more layers there are."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.data /= math.sqrt(2 * model.config.num_hidden_layers)
    return model


def build_optimizer(model: PreTrainedModel, fused: bool) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def next_token_loss(model: PreTrainedModel, tokens: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
    """Mean loss over the supervised tokens. tokens: int [B, T]; supervised: bool [B, T]."""
    ids = tokens.long()
    has_experts = hasattr(model.config, "num_experts")
    outputs = model(input_ids=ids, use_cache=False, **({"output_router_logits": True} if has_experts else {}))
    labels = ids[:, 1:].masked_fill(~supervised[:, 1:], -100)
    loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    return loss + BALANCE * outputs.aux_loss if has_experts else loss


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 products on a GPU; on a CPU, which may take longer for them than for fp32, none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def save_state(path: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> None:
    """Write what `load_state` needs to go on at `step`."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> int:
    """Restore model and optimizer; return the step to go on with."""
    state = torch.load(path, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def train(arguments: argparse.Namespace) -> None:
    """Train, log, write the weights, measure them."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device, start = torch.device(arguments.device), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    model = (build_mixture if arguments.experts else build_model)(len(tokenizer), *ids).to(device)
    optimizer = build_optimizer(model, fused=device.type == "cuda")
    first = load_state(arguments.state, model, optimizer) if arguments.state and arguments.state.exists() else 0
    vocabulary = RecallVocabulary.from_tokenizer(tokenizer)
    batches = Batches(vocabulary, arguments.tokens, arguments.steps, arguments.batch_tokens, arguments.seed)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, arguments.steps),
        num_workers=arguments.workers,
        prefetch_factor=8 if arguments.workers else None,
        pin_memory=device.type == "cuda",
    )
    loss_function = torch.compile(next_token_loss, dynamic=False) if arguments.compile else next_token_loss
    arguments.out.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a" if first else "w") as log_file:

        def log(**record: object) -> None:
            print(line := json.dumps(record), flush=True)
            log_file.write(line + "\n")
            log_file.flush()

        log(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            settings={name: value for name, value in vars(arguments).items() if not isinstance(value, Path | None)},
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            torch=torch.__version__,
        )
        total, since, seen = torch.zeros((), device=device), time.perf_counter(), 0
        for step, (tokens, supervised) in enumerate(loader, first):
            rate = learning_rate(step, arguments.steps, arguments.learning_rate, arguments.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, supervised = tokens.to(device, non_blocking=True), supervised.to(device, non_blocking=True)
            with mixed_precision(device):
                loss = loss_function(model, tokens, supervised)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total, seen = total + loss.detach(), seen + 1
            done = step + 1
            if done % arguments.log_every == 0 or done == arguments.steps:
                mean, now = total.item() / seen, time.perf_counter()
                speed = round(seen * arguments.batch_tokens / (now - since))
                log(step=done, loss=round(mean, 4), lr=round(rate, 6), tokens_per_s=speed, seconds=round(now - start, 1))
                total, since, seen = torch.zeros((), device=device), now, 0
            if done % arguments.recall_every == 0:
                with mixed_precision(device):
                    model.eval()
                    log(step=done, recall=recall(model, tokenizer, lengths=QUICK_LENGTHS, depths=QUICK_DEPTHS, count=32))
                    model.train()
                since = time.perf_counter()
            if arguments.state and done % arguments.save_every == 0:
                save_state(arguments.state, done, model, optimizer)
            if time.perf_counter() - start > 60 * arguments.minutes:
                log(step=done, stopped=f"time limit of {arguments.minutes} minutes")
                break
        if arguments.state:
            save_state(arguments.state, done, model, optimizer)
        log(trained_seconds=round(time.perf_counter() - start, 1))
        model.to(torch.bfloat16).save_pretrained(arguments.out)
        GenerationConfig(bos_token_id=ids[0], eos_token_id=ids[1], pad_token_id=ids[2]).save_pretrained(arguments.out)
        model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16).to(device).eval()
        log(perplexity=perplexity(model, tokenizer))
        log(continuations=continuations(model, tokenizer))
        if arguments.recall_count:
            log(recall=recall(model, tokenizer, count=arguments.recall_count), prompts_each=arguments.recall_count)
        log(total_seconds=round(time.perf_counter() - start, 1))


def parse_arguments() -> argparse.Namespace:
    """The command line; its defaults are the run that made the shipped weights."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", action="store_true", help="a small mixture of experts instead of the shipped Llama")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss, once for each row length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time, in mid-schedule")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--recall-every", type=int, default=500)
    parser.add_argument("--recall-count", type=int, default=100, help="prompts for each task, length and depth at the end")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--state", type=Path, help="training state: written here, and resumed from if it exists")
    parser.add_argument("--tokens", type=Path, default=TOKENS)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--log", type=Path, default=here / "training_log.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
