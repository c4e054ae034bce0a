"""The record of compiled kernels: what its keys depend on, and that what is not in it is compiled."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.compiler import ASTSource

from tests.kernels import compile_record
from tests.kernels.compile_record import Record, completed, key_of, read, recorded, write
from tests.tools.resources import Resources
from tests.tools.targets import TARGETS

SOURCE = """
import triton
import triton.language as tl

STEP = tl.constexpr(1)

@triton.jit
def stepped(x):
    return x + STEP

@triton.jit
def some_kernel(x_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, stepped(OPERATION(tl.load(at))))

@triton.jit
def once(x):
    return x

@triton.jit
def halved(x, COUNT: tl.constexpr = 1):
    if COUNT > 0:
        x = halved(x * 0.5, COUNT - 1)
    return x
"""
USED = Resources("choice_kernel", TARGETS["sm_90"], 32, 0, 4096, 4, False, ("(C7510) a remark",))


def key(
    tmp_path: Path, *, before: str = "", after: str = "", above: str = "", operation: str = "once", block: int = 16,
    pointer: str = "*fp32", warps: int = 4, target: str = "sm_90", remarks: bool = False,
) -> str:  # fmt: skip
    """The key of `some_kernel`, with `before` in its file replaced by `after`, and lines `above` it."""
    file = tmp_path / "some_kernels.py"
    file.write_text(above + (SOURCE.replace(before, after) if before else SOURCE))
    spec = importlib.util.spec_from_file_location("some_kernels", file)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    constants = {"OPERATION": getattr(module, operation), "BLOCK": block}
    signature = {"x_ptr": pointer, "OPERATION": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(module.some_kernel, signature, constants)
    return key_of(source, TARGETS[target], {"num_warps": warps}, remarks)


@pytest.mark.parametrize(
    "changed",
    [
        {"before": "x + STEP", "after": "x - STEP"},
        {"before": "constexpr(1)", "after": "constexpr(2)"},
        {"before": "arange(0, BLOCK)", "after": "arange(0, 2 * BLOCK)"},
        {"before": "return x\n\n", "after": "return 2 * x\n\n"},
        {"operation": "halved"},
        {"block": 32},
        {"pointer": "*bf16"},
        {"warps": 8},
        {"target": "sm_80"},
        {"remarks": True},
    ],
    ids=str,
)
def test_what_a_binary_follows_from_is_in_its_key(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert key(tmp_path, **changed) != key(tmp_path)


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    other = {"before": "x * 0.5", "after": "x * 0.25"}
    assert key(tmp_path, operation="halved", **other) != key(tmp_path, operation="halved")


def test_where_a_kernel_stands_is_not_in_its_key(tmp_path: Path) -> None:
    assert key(tmp_path, above="# A line more.\n\n") == key(tmp_path)
    # What it does not call.
    assert key(tmp_path, before="x * 0.5", after="x * 0.25") == key(tmp_path)


def test_what_is_not_in_the_record_is_compiled() -> None:
    case = "append, one token", "sm_90"
    assert recorded(*case, {}) is None
    whole = compile_record.compile_case(*case)
    assert [used.kernel for used in whole.values()] == ["rope_append_kernel"]
    assert recorded(*case, whole) == whole


def test_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_record, "RECORD", tmp_path / "compiled.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.0.0")
        write({"old": USED})
    assert read() == {}
    write({"b": USED, "a": USED})
    write({"a": USED})
    assert read() == {"a": USED}
    assert [json.loads(line)["key"] for line in (tmp_path / "compiled.jsonl").read_text().splitlines()] == ["old", "a"]


GOOD, OTHER, BAD = ("good", "sm_90"), ("other", "sm_90"), ("bad", "sm_90")


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Which cases were compiled together; `BAD` aborts the compiler, and what is behind it in the same processes is lost."""
    together = []

    def side_by_side(cases: list[tuple[str, str]], processes: int) -> Iterator[Any]:
        together.append(cases)
        for at, case in enumerate(cases):
            yield case, BrokenProcessPool() if BAD in cases[: at + 1] else {case[0]: USED}

    monkeypatch.setattr(compile_record, "_side_by_side", side_by_side)
    return together


def test_a_compiler_that_aborts_costs_its_own_case_only(compiles: list[list[tuple[str, str]]]) -> None:
    found = dict(completed([GOOD, BAD, OTHER]))
    assert found[GOOD] == {"good": USED} and found[OTHER] == {"other": USED} and isinstance(found[BAD], BrokenProcessPool)
    assert compiles == [[GOOD, BAD, OTHER], [BAD], [OTHER]]


def test_what_is_missing_is_compiled_and_written_at_once(
    compiles: list[list[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_record, "RECORD", tmp_path / "compiled.jsonl")
    monkeypatch.setattr(compile_record, "recorded", lambda name, target, record: {name: USED} if name in record else None)

    def cases(*asked: tuple[str, str]) -> None:
        monkeypatch.setattr(compile_record, "chosen", lambda wanted: iter(asked))

    def cut_off(record: Record) -> None:
        write(record)
        raise KeyboardInterrupt

    cases(GOOD, OTHER)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compile_record, "write", cut_off)
        compile_record.main("")
    assert read() == {"good": USED}
    assert compile_record.main("") == 0 and compiles == [[GOOD, OTHER], [OTHER]]
    # Nothing is forgotten while a case does not compile.
    cases(BAD)
    assert compile_record.main("") == 1 and set(read()) == {"good", "other"}
    cases(OTHER)
    assert compile_record.main("") == 0 and read() == {"other": USED}
