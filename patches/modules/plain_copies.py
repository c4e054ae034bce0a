"""`PlainCopies`: a patched class constructs, copies and pickles as the class that it was made from.

None of it touches the patched object, which another thread may be using.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from hf_fastattn.parallel.gathered_weights import unsharded_class
from hf_fastattn.patches.modules.scope import replaced

# What we attach to every object whose class we replaced.
STATE = "_fastattn"


class PlainCopies:
    """Goes in front of a class; `_fastattn_base` is that class."""

    _fastattn_base: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(model)(config)` is a plain model. Without arguments an empty object, as whoever fills it in expects."""
        return cls._fastattn_base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A plain, unpatched copy, of modules inside too."""
        root: Any = self
        patched = [module for module in root.modules() if STATE in vars(module)]
        for module in patched:
            kind = plain_class(type(module))
            # The copies exist before anything is copied into them: whatever refers to a module finds its copy.
            memo[id(module)] = kind.__new__(kind)
        for module in patched:
            vars(memo[id(module)]).update(copy.deepcopy(plain_vars(module), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the plain, unpatched object."""
        # From protocol 2 on pickle insists that the object's class be the pickled one; 1 names the class freely.
        return _plain_twin(self).__reduce_ex__(1)


def plain_class(kind: Any) -> Any:
    """`kind` as it would be had we never replaced it or a class that it was derived from since (FSDP2 derives some)."""
    return _plain_class(kind)


def written_class(kind: Any) -> Any:
    """The class in a model's code that `kind` is derived from, by us, by FSDP 2, or by both in any order."""
    return unsharded_class(plain_class(kind))


@functools.cache
def _plain_class(kind: Any) -> Any:
    ours = next((cls for cls in kind.__mro__ if "_fastattn_base" in vars(cls)), None)
    return kind if ours is None else replaced(kind, ours, ours._fastattn_base)


def plain_vars(module: Any) -> dict[str, Any]:
    """A copy of `vars(module)` without what we wrote there."""
    state = dict(vars(module))
    held = state.pop(STATE)
    for slot, value in held.plain_slots(module).items():
        if value is None:
            state.pop(slot, None)
        else:
            state[slot] = value
    return state


def _plain_twin(root: Any) -> Any:
    """The object's modules without our attributes, sharing every parameter with it."""
    twins: dict[int, Any] = {}
    modules: list[nn.Module] = list(root.modules())
    for module in modules:
        kind = plain_class(type(module))
        twins[id(module)] = kind.__new__(kind)
    for module in modules:
        state = plain_vars(module) if STATE in vars(module) else dict(vars(module))
        state["_modules"] = {name: child and twins[id(child)] for name, child in state["_modules"].items()}
        vars(twins[id(module)]).update(state)
    return twins[id(root)]
