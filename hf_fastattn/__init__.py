"""hf_fastattn: fast `model.generate()` for Transformers, with one line.

hf_fastattn.patch(model)
model.generate(**inputs, max_new_tokens=256)
hf_fastattn.unpatch(model)
"""

from hf_fastattn.cache import PagedCache
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.interface import register
from hf_fastattn.pages import CacheFullError, PagePool
from hf_fastattn.patches.scope import PatchScope
from hf_fastattn.patching import patch, patched, unpatch
from hf_fastattn.report import report

__all__ = [
    "CacheFullError",
    "FastAttnConfig",
    "PagePool",
    "PagedCache",
    "PatchScope",
    "patch",
    "patched",
    "register",
    "report",
    "unpatch",
]
