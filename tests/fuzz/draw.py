"""Random programs: what is done, in order, to a stock and to a patched model, as plain data that JSON can hold.

A program is `{"family", "dtype", "over", "patch", "graphs", "steps"}`; a step is `{"do": kind, ...}`, see `Side`.
"""

from __future__ import annotations

import random
from typing import Any

from tests.tools.models import FAMILIES, MODELS, OLD, VISION_MODELS, VOCAB

Program = dict[str, Any]
Step = dict[str, Any]
# Those in which most of the code lies come up more often.
WEIGHTED = ("llama", "llama", "qwen2", "qwen2_window", "mistral_window", "ministral")
PLACES = ("decoder", "layer", "attention", "mlp", "q_proj", "lm_head", "embeddings", "model")
HOOKS = ("record", "pool", "steer", "steer_last", "halve_input", "raise")
# The second half of them changes the model, or calls it, between two tokens.
PROCESSORS = ("bias", "history", "raise", "nested", "record", "add_hook", "toggle_hook", "scale", "replace", "forward")
CRITERIA = ("rows", "all_at", "raise", "toggle_hook", "replace")
ADAPTERS = ("lora", "lora_two", "lora_names", "lora_disabled", "lora_merged", "ia3", "prefix", "prompt")
EDITS = ("weights", "norm", "copy_layer", "swap_layers", "append_layer", "window", "eager", "sdpa", "is_causal", "float64",
         "float32", "head", "resize", "tie", "new_head", "checkpointing", "no_cache", "rope", "scaling", "drop_layer",
         "assign")  # fmt: skip
CACHE_EDITS = ("crop", "reorder", "select", "repeat", "deepcopy", "reset")
# What a user hangs in or changes, beside the arguments of a call.
OF_THE_USER = ("hook", "wrap", "adapter", "edit", "threads")
COPIES = ("deepcopy", "pickle", "saved")


def is_plain(program: Program) -> bool:
    """Whether a program has nothing of the user's own: no hooks, processors, criteria, wrappers, adapters or edits."""
    own = ("processor", "criterion")
    return not any(step["do"] in OF_THE_USER or any(name in step for name in own) for step in program["steps"])


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    family = rng.choice((*FAMILIES, *WEIGHTED))
    program: Program = {"family": family, "dtype": rng.choice(["float32", "float32", "float64"])}
    program["over"] = _over(rng, family)
    if program["dtype"] == "float64":
        # Eager attention of Transformers makes NaN of padding there.
        program["over"].pop("attn_implementation", None)
    program["patch"] = {"page_size": rng.choice([1, 2, 4, 8, 16, 16, 32, 64])}
    if rng.random() < 0.08:
        program["patch"]["memory_limit"] = int(2 ** rng.uniform(12, 22))
    if rng.random() < 0.1:
        program["patch"]["keep_memory"] = rng.choice([0, 0.5])
    if rng.random() < 0.2:
        program["graphs"] = True
    if rng.random() < 0.2:
        program["patch"]["prefix_cache"] = True
    foreign = rng.random() < 0.45
    steps = [_step(rng, family, foreign) for _ in range(rng.choice([1, 2, 2, 3, 4]))]
    if steps[-1]["do"] not in ("generate", "forward", "threads"):
        steps.append(_generate(rng, family, foreign))
    program["steps"] = steps
    return program


def _over(rng: random.Random, family: str) -> dict[str, Any]:
    over: dict[str, Any] = {}
    config = MODELS.get(family, (None, {}))[1]
    if config.get("sliding_window") and rng.random() < 0.6:
        over["sliding_window"] = rng.choice([2, 3, 5, 8, 11, 17, 40])
    if rng.random() < 0.06:
        over["attention_dropout"] = 0.3
    if rng.random() < 0.2:
        over["num_key_value_heads"] = rng.choice([1, 4])
    if rng.random() < 0.2:
        over["attn_implementation"] = "eager"
    return over


def _step(rng: random.Random, family: str, foreign: bool) -> Step:
    choice = rng.random()
    if choice < 0.7:
        return _generate(rng, family, foreign)
    if choice < 0.76:
        return {"do": "forward", "columns": rng.choice([1, 1, 3, 9]), "prompt": _prompt(rng, family)}
    if choice < 0.84:
        # Transformers cannot repeat or select rows of recurrent states.
        edits = CACHE_EDITS[-2:] if family.startswith(("qwen3_next", "qwen3_5")) else CACHE_EDITS
        return {"do": "edit_cache", "edit": rng.choice(edits), "amount": rng.randint(1, 12)}
    if choice < 0.87:
        return {"do": "repatch", "unpatched": rng.random() < 0.3}
    if choice < 0.89:
        return {"do": "train", "on": rng.random() < 0.7}
    if choice < 0.90:
        return {"do": "copy", "kind": rng.choice(COPIES)}
    if not foreign:
        return _generate(rng, family, foreign)
    kind = rng.choice(["hook", "hook", "wrap", "adapter", "edit", "edit", "unhook", "threads"])
    if kind == "hook":
        what = {"kind": rng.choice(HOOKS), "at": rng.choice(PLACES)}
        return {"do": "hook", **what, "layer": rng.randint(0, 2), "after": rng.randint(0, 9)}
    if kind == "wrap":
        return {"do": "wrap", "at": rng.choice(PLACES), "layer": rng.randint(0, 2), "scale": rng.choice([1.0, 0.9])}
    if kind == "adapter":
        return {"do": "adapter", "kind": rng.choice(ADAPTERS)}
    if kind == "edit":
        return {"do": "edit", "kind": rng.choice(EDITS), "layer": rng.randint(0, 2)}
    if kind == "threads":
        return {"do": "threads", "prompt": _prompt(rng, family), "new": rng.randint(2, 8)}
    return {"do": "unhook"}


def _prompt(rng: random.Random, family: str) -> dict[str, Any]:
    if family in VISION_MODELS and rng.random() < 0.5:
        return {"kind": "images", "seed": rng.randint(0, 99)}
    prompt: dict[str, Any] = {"rows": rng.choice([1, 1, 2, 3, 4]), "length": rng.choice([1, 2, 5, 9, 16, 17, 31, 33, 40]),
                              "seed": rng.randint(0, 999)}  # fmt: skip
    pad = rng.choice(["none", "none", "left", "left", "left", "right", "holes", "columns", "hidden_row"])
    if pad == "hidden_row" and rng.random() < 0.7:
        pad = "left"
    prompt["pad"] = pad
    for name, share in (("equal", 0.2), ("embeds", 0.1), ("positions", 0.08), ("no_mask", 0.1), ("token_types", 0.03)):
        if rng.random() < share:
            prompt[name] = True
    return prompt


def _generate(rng: random.Random, family: str, foreign: bool) -> Step:
    step: Step = {"do": "generate", "prompt": _prompt(rng, family), "seed": rng.randint(0, 999)}
    step["with"] = options = {"max_new_tokens": rng.choice([1, 2, 5, 8, 12, 20])}
    mode = rng.choice(["greedy", "greedy", "greedy", "sample", "sample", "beams", "beam_sample", "assisted", "lookup"])
    _mode(rng, mode, step, options)
    for name, value in _wishes(rng).items():
        options[name] = value
    if mode in ("assisted", "lookup") and rng.random() < 0.9:
        options.pop("cache_implementation", None)
        options.pop("use_cache", None)
    if mode in ("assisted", "lookup") or "prefill_chunk_size" in options:
        # Transformers takes the embeddings' mask for one of the token ids, of which there are none.
        step["prompt"].pop("embeds", None)
    if rng.random() < 0.3:
        step["chat"] = {"mask": rng.choice(["proper", "ones"]), "new": rng.choice([1, 4, 9]),
                        "cache": rng.choice(["returned", "returned", "copy", "none"])}  # fmt: skip
        if mode in ("assisted", "lookup") or options.get("use_cache") is False:
            # Transformers feeds the whole chat again there, under a mask that is too narrow.
            step["chat"]["cache"] = "none"
    elif rng.random() < 0.12 and options.get("use_cache", True):
        step["cache"] = rng.choice(["dynamic", "dynamic_plain", "paged", "static"])
    if rng.random() < 0.15:
        step["streamer"] = rng.choice(["collect", "collect", "raise"]) if foreign else "collect"
    if rng.random() < 0.12:
        step["generation_config"] = True
    if foreign and rng.random() < 0.25:
        step["processor"] = rng.choice(PROCESSORS)
    if foreign and rng.random() < 0.15:
        step["criterion"] = rng.choice(CRITERIA)
    if rng.random() < 0.15:
        step["mode"] = "inference"
    if mode in ("greedy", "sample") and rng.random() < 0.06:
        step["custom"] = True
    return step


def _mode(rng: random.Random, mode: str, step: Step, options: dict[str, Any]) -> None:
    options["do_sample"] = "sample" in mode or (mode in ("assisted", "lookup") and rng.random() < 0.3)
    if "beam" in mode:
        options["num_beams"] = rng.choice([2, 3, 4])
        if rng.random() < 0.4:
            options["num_return_sequences"] = rng.randint(1, options["num_beams"])
        if rng.random() < 0.3:
            options["early_stopping"] = rng.choice([True, False, "never"])
        if rng.random() < 0.3:
            options["length_penalty"] = rng.choice([-1.0, 0.0, 2.0])
    elif mode == "sample" and rng.random() < 0.5:
        options["num_return_sequences"] = rng.choice([2, 3, 8])
    elif mode == "lookup":
        options["prompt_lookup_num_tokens"] = rng.choice([1, 2, 5])
    elif mode == "assisted":
        step["assistant"] = rng.choice(["stock", "patched", "early_exit"])
    if mode in ("assisted", "lookup") and rng.random() < 0.9 and "rows" in step["prompt"]:
        step["prompt"]["rows"] = 1
    if options["do_sample"]:
        options["temperature"] = rng.choice([0.7, 1.5, 3.0])
        options["top_k"] = rng.choice([0, 5, 50])
        filters = {"top_p": 0.8, "min_p": 0.05, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01}
        for name, value in filters.items():
            if rng.random() < 0.2:
                options[name] = value


def _wishes(rng: random.Random) -> dict[str, Any]:
    """Options that any mode takes."""
    some = [rng.randint(1, VOCAB - 1) for _ in range(12)]
    letters = [chr(rng.randint(40, 120)) for _ in range(6)]
    choices: list[tuple[float, dict[str, Any]]] = [
        (0.30, {"eos_token_id": some}),
        (0.05, {"eos_token_id": some[0]}),
        (0.12, {"repetition_penalty": rng.choice([0.8, 1.3])}),
        (0.08, {"no_repeat_ngram_size": rng.choice([1, 2, 3])}),
        (0.06, {"bad_words_ids": [[some[1]], [some[2], some[3]]]}),
        (0.06, {"suppress_tokens": some[3:6]}),
        (0.04, {"begin_suppress_tokens": some[6:9]}),
        (0.04, {"forced_eos_token_id": some[9]}),
        (0.04, {"forced_bos_token_id": some[10]}),
        (0.04, {"sequence_bias": [[[some[11]], 3.0]]}),
        (0.03, {"exponential_decay_length_penalty": [3, 1.2]}),
        (0.03, {"guidance_scale": 1.5}),
        (0.03, {"renormalize_logits": True}),
        (0.03, {"remove_invalid_values": True}),
        (0.03, {"low_memory": True}),
        (0.03, {"max_time": 1e6}),
        (0.08, {"min_new_tokens": rng.choice([1, 3, 9])}),
        (0.04, {"min_length": rng.choice([5, 30])}),
        (0.08, {"stop_strings": letters}),
        (0.35, {"return_dict_in_generate": True}),
        (0.12, {"return_dict_in_generate": True, "output_scores": True, "output_logits": rng.random() < 0.5}),
        (0.06, {"return_dict_in_generate": True, "output_hidden_states": True}),
        (0.04, {"return_dict_in_generate": True, "output_attentions": True}),
        (0.03, {"use_cache": False}),
        (0.04, {"cache_implementation": rng.choice(["static", "offloaded", "dynamic", "dynamic_full", "hybrid"])}),
        (0.08, {} if OLD else {"prefill_chunk_size": rng.choice([1, 3, 8, 16])}),
    ]  # fmt: skip
    wishes: dict[str, Any] = {}
    for share, entries in choices:
        if rng.random() < share * 0.7:
            wishes.update(entries)
    return wishes
