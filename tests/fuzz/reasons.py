"""The closed list of reasons for which a call, or a forward in it, does as Transformers does.

Programs without anything of the user's own may show the first ones only; hooks, wrapped forwards, processors, adapters,
edits of the model and threads may show the others too. Any other reason is a fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.draw import is_plain


@dataclass(frozen=True)
class Reason:
    """One reason, and what brings it up.

    Attributes:
        pattern: that it matches as a whole.
        steps: the program that needs it; none where only another part of the project's tests does.
        family: of that program.
        over: entries of its configuration.
    """

    pattern: str
    steps: tuple[dict[str, Any], ...] = ()
    family: str = "llama"
    over: dict[str, Any] = field(default_factory=dict)

    def program(self) -> dict[str, Any]:
        """As `run_program` takes it."""
        return {"family": self.family, "dtype": "float32", "over": self.over, "patch": {}, "steps": list(self.steps)}


def call(rows: int = 2, length: int = 9, pad: str = "none", *, step: Any = None, prompt: Any = None, **wishes: Any) -> dict:
    """A step that generates four tokens."""
    given = {"rows": rows, "length": length, "seed": 1, "pad": pad, **(prompt or {})}
    return {"do": "generate", "prompt": given, "seed": 1, "with": {"max_new_tokens": 4, "do_sample": False, **wishes},
            **(step or {})}  # fmt: skip


FULL_DICT = {"return_dict_in_generate": True}
TRAIN = {"do": "train", "on": True}
DROPOUT = {"attention_dropout": 0.3}
# Without anything of the user's own.
PLAIN = (
    Reason(r"a row of the prompt has no visible token", (call(pad="hidden_row"),)),
    Reason(r"no row has a new token", (call(pad="columns", prefill_chunk_size=1),)),
    Reason(r"\d+ positions for \d+ columns"),
    Reason(r"attention weights are asked for", (call(output_attentions=True, **FULL_DICT),)),
    Reason(r"attention dropout is active", (TRAIN, call()), over=DROPOUT),
    Reason(
        r"equal rows are computed one by one: attention dropout is drawn for every row",
        (TRAIN, call(prompt={"equal": True})), over=DROPOUT,
    ),
    Reason(r"the mask hides a column whose logits are read", (call(pad="right"),)),
    Reason(
        r"the mask has holes, and a sliding window counts them",
        (call(pad="holes", length=31),), family="mistral_window",
    ),
    Reason(r"(cache|past_key_values) is an? (offloaded )?(Static|Dynamic)Cache", (call(step={"cache": "static"}),)),
    Reason(
        r"(cache|past_key_values) is a DynamicCache of \d+ layers, and the model has \d+",
        (call(step={"cache": "dynamic_plain"}),), family="mistral_window",
    ),
    Reason(
        r"layer \d+ of (cache|past_key_values) is a DynamicLayer, and that of the model a DynamicSlidingWindowLayer",
        (call(step={"cache": "dynamic_plain"}), call(step={"chat": {"mask": "ones", "new": 4, "cache": "returned"}})),
        family="mistral_window",
    ),
    Reason(
        r"the mask hides tokens that are cached",
        (
            call(rows=3, eos_token_id=list(range(1, 40)), max_new_tokens=20, return_dict_in_generate=True),
            call(step={"chat": {"mask": "proper", "new": 4, "cache": "returned"}}),
        ),
        family="mistral_window", over={"sliding_window": 3},
    ),
    Reason(
        r"padding stays, since token_type_ids may belong to rows or columns",
        ({"do": "forward", "columns": 1, "prompt": {**call(pad="left")["prompt"], "token_types": True}},),
        family="qwen3_vl",
    ),
    Reason(r"cache_implementation='\w+', use_cache=(True|None|False)"),
    Reason(
        r"cache_implementation='static', use_cache=(True|None), and the cache is returned",
        (call(cache_implementation="static", **FULL_DICT),),
    ),
    Reason(r"cache_implementation=None, use_cache=False", (call(use_cache=False),)),
)  # fmt: skip
HOOK = {"do": "hook", "kind": "record", "at": "layer", "layer": 1, "after": 0}
WRAP = {"do": "wrap", "at": "mlp", "layer": 1, "scale": 1.0}


def edit(kind: str) -> dict[str, Any]:
    return {"do": "edit", "kind": kind, "layer": 1}


# With hooks, wrapped forwards, adapters or edits.
FOREIGN = (
    Reason(r"padding stays: .*", (HOOK, call(pad="left"))),
    Reason(r"equal rows are computed one by one: .*", (WRAP, call(prompt={"equal": True}))),
    Reason(r"the model is busy in another thread"),
    Reason(
        r"layer \d+ of (cache|past_key_values) has a window of \d+ tokens, and that of the model one of \d+",
        (
            call(pad="hidden_row", **FULL_DICT),
            edit("window"),
            call(step={"chat": {"mask": "ones", "new": 4, "cache": "returned"}}),
        ),
        family="mistral_window",
    ),
    Reason(r"is_causal=False in layer \d+", (edit("is_causal"), call())),
    Reason(r"attn_implementation='\w+' in layer \d+ alone"),
    Reason(r"the attention of layer \d+ is not the one that was patched", (edit("copy_layer"), call())),
    Reason(r"layer \d+ writes to the cache as layer \d+", (edit("swap_layers"), call())),
    Reason(r"the forward of class \w+ was replaced"),
    Reason(r"(cache|past_key_values) is a \w+"),
    Reason(
        r"(the )?(cache|past_key_values) holds keys in torch\.\w+, and the model writes torch\.\w+",
        (call(**FULL_DICT), edit("float64"), call(step={"chat": {"mask": "ones", "new": 4, "cache": "returned"}})),
    ),
)


def unknown_reasons(program: dict[str, Any], step: int, fallbacks: dict[str, int]) -> str | None:
    """The first reason that the program has no right to; None if there is none.

    Args:
        step: at which the reasons came up.
        fallbacks: reasons and how often.
    """
    plain = is_plain({**program, "steps": program["steps"][: step + 1]})
    known = PLAIN if plain else PLAIN + FOREIGN
    unknown = (reason for reason in fallbacks if not any(re.fullmatch(one.pattern, reason) for one in known))
    return next((f"the reason {reason!r} is not in the list" for reason in unknown), None)
