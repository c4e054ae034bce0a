"""hf_fastattn: fast `model.generate()` for Transformers, with one line.

hf_fastattn.patch(model)
model.generate(**inputs, max_new_tokens=256)
hf_fastattn.unpatch(model)
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_fastattn.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_fastattn.cache.paged_cache import PagedCache
    from hf_fastattn.config import FastAttnConfig
    from hf_fastattn.interface import register
    from hf_fastattn.kernels.variants.trace import VariantError
    from hf_fastattn.kernels.variants.variant import Variant
    from hf_fastattn.layer_variants import StockAttentionError
    from hf_fastattn.memory import release_memory
    from hf_fastattn.pages.page_pool import CacheFullError, PagePool
    from hf_fastattn.patches.modules.scope import PatchScope
    from hf_fastattn.patching import patch, patched, unpatch
    from hf_fastattn.report import report
    from hf_fastattn.search import append, fork, truncate
    from hf_fastattn.stream_layout import Streaming
    from hf_fastattn.warming import warm_up

__all__ = [
    "CacheFullError",
    "FastAttnConfig",
    "PagePool",
    "PagedCache",
    "PatchScope",
    "StockAttentionError",
    "Streaming",
    "Variant",
    "VariantError",
    "append",
    "fork",
    "patch",
    "patched",
    "register",
    "release_memory",
    "report",
    "truncate",
    "unpatch",
    "warm_up",
]

# PyTorch and Transformers take seconds to import, so what needs them is imported when it is first asked for.
_DEFINED_IN = {
    "CacheFullError": "hf_fastattn.pages.page_pool",
    "FastAttnConfig": "hf_fastattn.config",
    "PagePool": "hf_fastattn.pages.page_pool",
    "PagedCache": "hf_fastattn.cache.paged_cache",
    "PatchScope": "hf_fastattn.patches.modules.scope",
    "StockAttentionError": "hf_fastattn.layer_variants",
    "Streaming": "hf_fastattn.stream_layout",
    "Variant": "hf_fastattn.kernels.variants.variant",
    "VariantError": "hf_fastattn.kernels.variants.trace",
    "append": "hf_fastattn.search",
    "fork": "hf_fastattn.search",
    "patch": "hf_fastattn.patching",
    "patched": "hf_fastattn.patching",
    "register": "hf_fastattn.interface",
    "release_memory": "hf_fastattn.memory",
    "report": "hf_fastattn.report",
    "truncate": "hf_fastattn.search",
    "unpatch": "hf_fastattn.patching",
    "warm_up": "hf_fastattn.warming",
}


class _Package(ModuleType):
    """Imports public names, and modules as in `hf_fastattn.interface.counters`, at first use."""

    def __getattr__(self, name: str) -> Any:
        if name in _DEFINED_IN:
            value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
            setattr(self, name, value)
            return value
        if name in _modules():
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module report.py would otherwise set it as the attribute `report`, over the function of that name.
        if name == "report" and isinstance(value, ModuleType):
            value = value.report
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*__all__, *_modules(), *(name for name in vars(self) if name.startswith("__"))})


def _modules() -> set[str]:
    """Names of the modules and folders in this package."""
    from pathlib import Path

    entries = [entry for folder in __path__ for entry in Path(folder).iterdir() if entry.name[0] not in "_."]
    return {entry.stem for entry in entries if entry.is_dir() or entry.suffix == ".py"}


sys.modules[__name__].__class__ = _Package
