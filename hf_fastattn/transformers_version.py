"""What differs between the supported versions of Transformers.

5.24 renamed `past_key_values` to `cache`: the parameter of every forward, the entry of generate()'s `model_kwargs` and
the field of every output. All code here says `CACHE` where Transformers sees the name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import transformers
from packaging.version import Version
from transformers import GenerationMixin

# The first release that works, and the first one that was not tried.
TESTED: Final = ("5.17.0", "5.25")
OLD_NAME: Final = "past_key_values"
NEW_NAME: Final = "cache"
CACHE: Final[str] = (
    NEW_NAME if NEW_NAME in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD_NAME
)
# The release that renamed it also keeps the cache where checkpointing is on but no gradients are recorded.
CHECKPOINTING_NEEDS_GRADIENTS: Final = CACHE == NEW_NAME
# Whether the exponential decay penalty passes over end tokens of score -inf; elsewhere it makes NaN of them.
ENDS_MAY_BE_SUPPRESSED: Final = Version(transformers.__version__) >= Version("5.23")


def is_tested() -> bool:
    """Whether the installed Transformers is one that was tried."""
    return Version(TESTED[0]) <= Version(transformers.__version__) < Version(TESTED[1])


def supported_versions() -> str:
    """The versions that were tried, in words."""
    return f"transformers >= {TESTED[0]} and < {TESTED[1]}"


def spelled_as_here(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose parameter is called `cache`, with the parameter's name and deprecations of this Transformers.

    Transformers looks arguments up by the signature of a forward, and so do we before one is replaced.
    """
    if CACHE == NEW_NAME:
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg(OLD_NAME, "5.40.0", new_name=NEW_NAME)(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if OLD_NAME in kwargs:
            kwargs[NEW_NAME] = kwargs.pop(OLD_NAME)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=OLD_NAME) if p.name == NEW_NAME else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed
