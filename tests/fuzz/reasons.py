"""The closed list of reasons for which a call, or a forward in it, does as Transformers does.

Programs without anything of the user's own may show the first ones only; hooks, wrapped forwards, adapters, edits of the
model and threads may show the others too. Any other reason is a fault.
"""

from __future__ import annotations

import re
from typing import Any

PLAIN = (
    r"a row of the prompt has no visible token",
    r"no row has a new token",
    r"attention weights are asked for",
    r"router logits, padding's too, are asked for",
    r"gradients are needed",
    r"(attention|residual|embedding) dropout is active",
    r"equal rows are computed one by one: (attention )?dropout is drawn for every row",
    r"the mask hides the last token of a row",
    r"the mask hides columns by whose logits drafts are verified",
    r"the mask hides tokens that are cached",
    r"the mask has holes, and a sliding window counts them",
    r"(cache|past_key_values) is an? (offloaded )?\w+( of \d+ layers, and the model has \d+)?",
    r"layer \d+ of (cache|past_key_values) .*",
    r"cache_implementation=.*, use_cache=(True|False)",
    r"use_cache=False",
    r"a forward without a PagedCache",
    r"a custom attention mask is given",
    r"the cache holds dense layers",
    r"some layers of the cache are empty",
    r"keys and values in the cache are of different shapes",
    r"the layers of the cache hold different numbers of (tokens|rows)",
    r"a layer with a sliding window holds another number of tokens than it has seen",
)
FOREIGN = (
    r"(padding stays|equal rows are computed one by one): .*",
    r"padding stays, since \w+ may belong to rows or columns",
    r"the model is busy in another thread",
    r"is_causal=False( in the configuration| in layer \d+)?",
    r"the attention of layer \d+ is not the one that was patched",
    r"layer \d+ writes to the cache as layer \d+",
    r"a \w+ is not Transformers' own layer",
    r"attn_implementation='.*' is a function of .*",
    r"the forward of class \w+ was replaced",
    r"[\w.]+ was replaced",
    r"the \w+ was put in after patch\(\)",
    r"gradient checkpointing runs the layers without the cache",
    r"the cache holds torch\.\w+.*, and the model writes torch\.\w+",
    r"gradients of cached keys are needed",
    r".*holds? keys.*",
)
OF_THE_USER = {"hook", "wrap", "adapter", "edit", "threads", "train"}


def unknown_reasons(program: dict[str, Any], step: int, fallbacks: dict[str, int]) -> str | None:
    """The first reason that the program has no right to; None if there is none.

    Args:
        step: at which the reasons came up.
        fallbacks: reasons and how often.
    """
    foreign = any(entry["do"] in OF_THE_USER or "processor" in entry for entry in program["steps"][: step + 1])
    known = PLAIN + FOREIGN if foreign else PLAIN
    unknown = (reason for reason in fallbacks if not any(re.fullmatch(pattern, reason) for pattern in known))
    return next((f"the reason {reason!r} is not in the list" for reason in unknown), None)
