"""`fast_class`: the class that a patched model has."""

from __future__ import annotations

import functools
from typing import Any

from hf_fastattn.batching.hooks import FastBatchingMixin
from hf_fastattn.generation.hooks import FastGenerationMixin
from hf_fastattn.generation.prefix_call import look_at_once
from hf_fastattn.generation.stock_cache import why_no_cache
from hf_fastattn.runtime import Runtime


@functools.cache
def fast_class(base: Any) -> type:
    """A subclass of a model class with our hooks, by the same name: Transformers looks classes up by it.

    Its `generate()` takes and returns what the model's does; pages are released when it returns or fails.
    """

    @functools.wraps(base.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime: Runtime = self._fastattn.runtime
        call = functools.partial(base.generate, self, *args, **kwargs)  # type: ignore[attr-defined]

        def looked_at() -> Any:
            look_at_once(self, args, kwargs)
            return call()

        why_aside = why_no_cache(self, args, kwargs)
        return runtime.call(self.training, looked_at if why_aside is None else call, why_aside)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    bases = (FastGenerationMixin, FastBatchingMixin, base)
    return type(base.__name__, bases, {**names, "generate": generate, "_fastattn_base": base})
