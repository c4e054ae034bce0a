"""Whether anybody looks at hidden states from outside, who must see a batch as Transformers shows it.

That is: padded, and no equal rows merged. Asked only where a prompt has padding or equal rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from hf_fastattn.graphs.module_checks import HARMLESS_HOOKS, has_global_hooks, is_our_forward, names_by_row, submodules
from hf_fastattn.graphs.seen_modules import Seen, look
from hf_fastattn.wrappers import below_trl, calls_forward, compiled_from, origin_of

Hook = TypeVar("Hook", bound=Callable[..., Any])

# Libraries whose modules treat every token by itself, or are told which tokens belong together.
KNOWN = ("torch.", "transformers.", "peft.", "accelerate.", "bitsandbytes.", "gptqmodel.", "auto_gptq.", "awq.", "hqq.",
         "optimum.", "compressed_tensors.", "torchao.", "liger_kernel.")  # fmt: skip
# Quantised layers whose scales or outliers come from the whole batch, padding included.
SCALED_BY_BATCH = ("torch.ao.nn.quantized.dynamic.", "bitsandbytes.nn.modules.Linear8bitLt")


def takes_packed_rows(hook: Hook) -> Hook:
    """`hook`, known to see `[1, T, hidden]` for padded rows: padding goes on being taken out. Returns the same function."""
    hook.takes_packed_rows = True  # type: ignore[attr-defined]
    return hook


def why_watched(root: nn.Module, by_row: bool = False, seen: Seen | None = None) -> str | None:
    """Why the modules from `root` down may depend on how a batch is laid out; None if nobody looks.

    Args:
        by_row: whoever asks takes care of the adapters that PEFT's hooks choose for each row.
        seen: a look at the modules as they are, from `root` down or around it, if there was one.
    """
    if seen is not None:
        return seen.answer(("watched", id(root), by_row), lambda: why_watched(root, by_row))
    return _first_reason(root, (_why_watched_but_by_row if by_row else _why_watched,))


def why_rows_differ(root: nn.Module, seen: Seen | None = None) -> str | None:
    """Why equal rows may have different hidden states; None if each distinct one may be computed once.

    Args:
        seen: a look at the modules as they are, if there was one.
    """
    seen = look(root) if seen is None else seen
    return seen.answer("rows differ", lambda: _first_reason(root, (_why_watched, _why_random)))


def _first_reason(root: nn.Module, questions: tuple[Callable[[nn.Module], str | None], ...]) -> str | None:
    if has_global_hooks():
        return "hooks on all modules are registered"
    for module in (root, *submodules(root)):
        for question in questions:
            reason = question(module)
            if reason is not None:
                return reason
    return None


def _why_watched_but_by_row(module: nn.Module) -> str | None:
    known = not module._forward_hooks and names_by_row(module) is not None
    return _why_class(cast(Any, type(module)), type(module).forward) if known else _why_watched(module)


def _why_watched(module: nn.Module) -> str | None:
    state, kind = vars(module), type(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
        if not all(map(_is_harmless, hooks)):
            return f"a {kind.__name__} has hooks"
    if "_hf_hook" in state:
        hook = state["_hf_hook"]
        return None if _only_moves(hook) else f"a {kind.__name__} has a {type(hook).__name__}"
    if "forward" in state and not _is_known_forward(state):
        return f"the forward of a {kind.__name__} was replaced"
    if not calls_forward(kind):
        return f"a {kind.__name__} is called by a function of its own"
    return _why_class(cast(Any, kind), getattr(kind, "forward", None))


def _is_harmless(hook: Any) -> bool:
    if getattr(hook, "__name__", "") in HARMLESS_HOOKS or getattr(hook, "takes_packed_rows", False):
        return True
    # Hooks of torch itself (FSDP, weight norm) look at parameters, not at hidden states.
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _only_moves(hook: Any) -> bool:
    """Whether accelerate's hook is of accelerate's own kinds, which move tensors and cast them."""
    hooks = getattr(hook, "hooks", (hook,))
    return all(type(held).__module__.startswith("accelerate.") for held in hooks)


def _is_known_forward(state: dict[str, Any]) -> bool:
    """Ours, accelerate's for mixed precision, Transformers' for shards; any of them compiled, or under TRL's."""
    forward = compiled_from(state["forward"]) or below_trl(state["forward"]) or state["forward"]
    return is_our_forward(forward) or origin_of(forward).startswith(("transformers.", "torch.", "accelerate."))


@functools.lru_cache(maxsize=256)
def _why_class(kind: Any, forward: Any) -> str | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name.startswith(SCALED_BY_BATCH):
        return f"a {kind.__name__} scales activations by the whole batch"
    # Our own forwards bear the names of the classes that they stand in.
    origin = str(getattr(forward, "__module__", ""))
    return None if origin.startswith((*KNOWN, "hf_fastattn.")) else f"a {name} may look at the whole batch"


def _why_random(module: nn.Module) -> str | None:
    # What torch.compile put around a module has no mode of its own.
    if not vars(module).get("training"):
        return None
    if isinstance(module, _DropoutNd) and module.p > 0:
        return "dropout is drawn for every row"
    config = getattr(module, "config", None)
    if getattr(config, "attention_dropout", 0.0):
        return "attention dropout is drawn for every row"
    if getattr(module, "jitter_noise", 0.0):
        return "noise of the router is drawn for every row"
    return None
