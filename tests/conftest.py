"""Shared test set-up: the `gpu` marker, and few threads so that test machines are shared fairly."""

import math
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from hf_fastattn.page_groups import PageGroups
from hf_fastattn.page_storage import PageStorage
from hf_fastattn.pages import PagePool

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def nan_in_every_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages nobody has written, and pages that were freed, hold NaN: reading one slot too many shows in every output."""
    grown, make, release = PageStorage._grown, PageGroups.__init__, PagePool.release

    def grown_with_nan(old: Any, shape: Any, like: torch.Tensor) -> torch.Tensor:
        pages = grown(old, shape, like)
        pages[0 if old is None else old.shape[0] :] = math.nan
        return pages

    def make_and_link(self: PageGroups, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for group in self:
            storages[group.pool] = group.storage

    def release_with_nan(self: PagePool, pages: Iterable[int]) -> None:
        pages = list(pages)
        release(self, pages)
        freed = [page for page in pages if not self.owners(page)]
        storage = storages.get(self)
        for pair in storage._pages.values() if storage is not None else ():
            for tensor in pair:
                with torch.no_grad():
                    tensor[[page for page in freed if page < len(tensor)]] = math.nan

    storages: weakref.WeakKeyDictionary[PagePool, PageStorage] = weakref.WeakKeyDictionary()
    monkeypatch.setattr(PageStorage, "_grown", staticmethod(grown_with_nan))
    monkeypatch.setattr(PageGroups, "__init__", make_and_link)
    monkeypatch.setattr(PagePool, "release", release_with_nan)
