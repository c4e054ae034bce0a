"""Shared test set-up: the `gpu` and `interpreter` markers, names of failures, NaN where nothing was written, gradients."""

import gc
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.page_storage import PageStorage, copied_with

torch.set_num_threads(1)
# `torch.device` as a context looks up once what makes tensors: not while a test has replaced `torch.empty`.
with torch.device("cpu"):
    torch.empty(0)


# Bytes that a process may go on to hold after a test.
LARGE = 2**31
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Failures:
    """Says at once which test failed, for a run that is cut off before pytest's summary."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\nFAILED in {report.when}: {report.nodeid}", file=sys.stderr, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist report to the process that started them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures())
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    config.addinivalue_line("markers", "interpreter: runs kernels in Triton's interpreter, in a pytest run of its own")
    if INTERPRETING:
        from tests.tools import interpreter

        interpreter.repair()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETING:
        others = [item for item in items if not item.get_closest_marker("interpreter")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("interpreter")]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (`make test` runs pytest once more with it)"))


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected() -> None:
    """What PyTorch and Transformers made as they were imported outlives all tests: collections need not look through it.

    Transformers' continuous batching collects often, and each time would look at more than a million objects.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Some libraries report what is not collected at the end.
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels compiled without a GPU are compiled anew in every run, and left where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(autouse=True)
def gradients_as_before() -> Iterator[None]:
    """A test that leaves gradients off would fail others, far from here."""
    before = torch.is_grad_enabled()
    yield
    after = torch.is_grad_enabled()
    torch.set_grad_enabled(before)
    assert after == before


@pytest.fixture(autouse=True)
def devices_as_before() -> Iterator[None]:
    """A test that leaves contexts of devices without effect, or one of its own on, would move the models of others."""
    yield
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
    assert torch.empty(1).device.type == "cpu"


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """On a GPU that workers share, what a large test took is there for the others."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > LARGE:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def nan_in_what_kernels_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces of the launchers start as NaN: an element that a kernel leaves unwritten shows."""

    def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_with_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("hf_fastattn.kernels.")
            return tensor.fill_(math.nan) if ours and tensor.is_floating_point() else tensor

        return allocate_with_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def nan_in_every_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages nobody has written, and pages that were freed, hold NaN: reading one slot too many shows in every output."""
    grown, make, release = PageStorage._grown, PageGroups.__init__, PagePool.release

    def grown_with_nan(old: Any, shape: Any, like: torch.Tensor) -> torch.Tensor:
        pages = grown(old, shape, like)
        # As bytes, 255 is NaN in e4m3, and two of them in bf16.
        pages[0 if old is None else old.shape[0] :] = math.nan if pages.is_floating_point() else 255
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
            for tensor in copied_with(pair):
                with torch.no_grad():
                    nothing = math.nan if tensor.is_floating_point() else 255
                    tensor[[page for page in freed if page < len(tensor)]] = nothing

    storages: weakref.WeakKeyDictionary[PagePool, PageStorage] = weakref.WeakKeyDictionary()
    monkeypatch.setattr(PageStorage, "_grown", staticmethod(grown_with_nan))
    monkeypatch.setattr(PageGroups, "__init__", make_and_link)
    monkeypatch.setattr(PagePool, "release", release_with_nan)
