"""When one of the processes that compute a model fails, the others end with an error that says so, and soon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hf_fastattn.parallel import watch
from hf_fastattn.parallel.watch import RankFailedError, Watch
from tests.parallel import alone, failing, ranks
from tests.tools.models import tiny
from tests.tools.processes import processes

# The times that a watch waits, in tests.
QUICK = {"POLL": 0.02, "GRACE": 0.2, "SILENT": 0.5, "LATE": 1.0, "LONGEST_STEP": 1.0}


# How rank 1 fails, and when; what is said of it.
FAILURES = [
    ("step", "raises", 'KeyError: "somebody\'s mistake"'),
    ("step", "has no memory", "OutOfMemoryError: CUDA out of memory"),
    ("step", "is interrupted", "KeyboardInterrupt"),
    ("step", "is killed", ""),
    ("step", "stops", "was not heard of for 3 s"),
    ("halves", "has no memory", "OutOfMemoryError: CUDA out of memory"),
    ("halves", "is killed", ""),
    ("prefix", "is interrupted", "KeyboardInterrupt"),
    ("prefix", "is killed", ""),
]


@pytest.mark.parametrize(("when", "how", "error"), FAILURES)
def test_the_other_rank_ends(tmp_path: Path, when: str, how: str, error: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    errors = tmp_path / "errors"
    with processes(2, str(errors)) as two:
        two.run(ranks.why_not, str(tmp_path))
        two.send(failing.generate_and_fail, str(tmp_path), when, how)
        # gloo sees at once that a process has gone, and never that one is late: its process is ended then.
        other = two.receive(0, 30)
        failed = None if how == "stops" else two.receive(1, 30)
    if how == "is killed":
        assert failed is None and other.startswith("RuntimeError") and "remote worker" in other
        assert "then RankFailedError" in other
        return
    assert other is None, getattr(other, "trace", other)
    said = errors.read_text()
    assert "hf_fastattn ends this process, rank 0: rank 1" in said and error in said
    if how != "stops":
        assert failed.startswith(error) and "; then RankFailedError" in failed


def test_all_are_interrupted_at_once(tmp_path: Path) -> None:
    """As by Ctrl-C in a terminal: where ranks end at the same step, the next call goes on."""
    tiny("llama").save_pretrained(tmp_path)
    with processes(2) as two:
        for said in two.run(failing.generate_and_fail, str(tmp_path), "step", "all are interrupted"):
            assert said == "KeyboardInterrupt: ; then nothing"


def test_a_rank_that_stops_before_the_others(tmp_path: Path) -> None:
    """Where a criterion ends one rank alone, the other waits for ever in stock; here both end."""
    tiny("llama").save_pretrained(tmp_path)
    errors = tmp_path / "errors"
    with processes(2, str(errors)) as two:
        two.send(alone.stops_alone, str(tmp_path))
        ended, waited = two.receive(1, 60), two.receive(0, 60)
    assert waited is None and "rank 1 has ended the call, and a step here waits for it" in errors.read_text()
    assert ended.startswith("RankFailedError")


class Store(dict[str, bytes]):
    """As that of a process group."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(watch, name, seconds)


def call(
    store: Any, seconds: float, receives: bool = False, why_gone: Any = lambda: None
) -> tuple[list[str], RankFailedError | None]:
    """A call on rank 0 of two that waits, by the device or in a step; whether it was aborted, and what it raised."""
    aborted: list[str] = []
    one = Watch(store, 0, 2, lambda: aborted.append("aborted"), why_gone)
    try:
        with one:
            if receives:
                one.begin_to_wait()
            until = time.monotonic() + seconds
            # An abort ends the wait.
            while time.monotonic() < until and not aborted:
                time.sleep(0.01)
            if receives:
                one.end_waiting()
    except RankFailedError as error:
        return aborted, error
    return aborted, None


def test_a_failed_rank_ends_the_call(quick: None) -> None:
    store = Store()
    store.set("1", "failed after 3: ValueError: no")
    aborted, error = call(store, 10)
    assert aborted and "rank 1 has failed with ValueError: no" in str(error)
    assert store["0"].startswith(b"failed after 0: RankFailedError")


def test_a_call_that_ends_by_itself_is_not_given_up(quick: None) -> None:
    store = Store()
    store.set("1", "failed after 3: ValueError: no")
    assert call(store, 0.1) == ([], None)
    assert store["0"] == b"done"


def test_a_silent_rank_ends_the_call(quick: None) -> None:
    store = Store()
    store.set("1", "7")
    aborted, error = call(store, 10)
    assert aborted and "rank 1 was not heard of" in str(error)


def test_a_rank_may_be_late(quick: None) -> None:
    assert call(Store(), 0.8) == ([], None)
    aborted, error = call(Store(), 10)
    assert aborted and "rank 1 has not come to the call" in str(error)


def test_a_rank_that_is_done_may_be_silent(quick: None) -> None:
    store = Store()
    store.set("1", "done")
    assert call(store, 1.0) == ([], None)


class Beating(Store):
    """In which rank 1 is at work."""

    def get(self, key: str, default: Any = None) -> Any:
        return b"%d" % time.monotonic_ns() if key == "1" else super().get(key, default)

    def check(self, keys: list[str]) -> bool:
        return keys == ["1"] or super().check(keys)


def test_a_step_that_does_not_end(quick: None) -> None:
    aborted, error = call(Beating(), 10, receives=True)
    assert aborted and "a step has not ended" in str(error)


@pytest.mark.parametrize("said", ["1", "result 1"], ids=["has returned", "has generated"])
def test_a_step_that_waits_for_a_rank_that_has_ended(quick: None, said: str) -> None:
    store = Beating() if said != "1" else Store()
    store.set(said, "done" if said == "1" else "7")
    aborted, error = call(store, 10, receives=True)
    assert aborted and "rank 1 has ended the call, and a step here waits for it" in str(error)


def test_a_rank_that_will_not_come(quick: None) -> None:
    aborted, error = call(Store(), 10, why_gone=lambda: "rank 1 has unpatched the model")
    assert aborted and "rank 1 has unpatched the model" in str(error)


def test_a_store_that_is_gone(quick: None) -> None:
    class Gone(Store):
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("connection reset")

    aborted, error = call(Gone(), 10)
    assert aborted and "the store of the process group does not answer" in str(error)


def test_the_error_of_the_call_itself_is_told_to_the_others(quick: None) -> None:
    store = Store()
    with pytest.raises(KeyError), Watch(store, 0, 2, lambda: None):
        raise KeyError("mine")
    assert store["0"] == b"failed after 0: KeyError: 'mine'"
