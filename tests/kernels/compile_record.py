"""What compiled kernels take, by what they are compiled from: kernels that are in the record need not be compiled again.

A binary follows from the source, constants and options of a kernel, the compiler, the assembler and the target. The record
holds what was read of it under a hash of these, so that a change to any of them is not found, and is compiled.

`python -m tests.kernels.compile_record` compiles what is missing for the installed Triton, and forgets what no case has;
cut off, it goes on where it was. `make record` does so with both versions of Triton.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.jit import DependenciesFinder, JITCallable

from tests.kernels.compile_cases import CASES, SPILLED_BYTES, Case
from tests.tools import fake_driver, resources, targets
from tests.tools.resources import Resources
from tests.tools.targets import TARGETS, Target

RECORD = Path(__file__).with_name("compiled.jsonl")
# A change to how kernels are measured makes the record void.
MEASURED = "".join(inspect.getsource(module) for module in (resources, targets))

Record = dict[str, Resources]


class NotRecorded(Exception):
    """A kernel would have to be compiled."""


def chosen(wanted: str) -> Iterator[tuple[str, str]]:
    """Every case for sm_90, and for each other target one of the same kernels and precision.

    With `wanted` "all" every case for every target; with "few" one of the same kernels and precision for sm_90, and
    those whose registers are taken to the last, which is where compilers differ.
    """
    for name, case in CASES.items():
        for target in case.targets:
            one, hopper = name == representative(case, target), target == "sm_90"
            if wanted == "few":
                taken = hopper and (one or case.overlapped or case.spilled != SPILLED_BYTES)
            else:
                taken = hopper or one or wanted == "all"
            if taken:
                yield name, target


def representative(case: Case, target: str) -> str:
    """The case of the kernels and precision of `case` that stands for them: for sm_100 another one than for the others."""
    alike = [name for name, other in CASES.items() if (other.kernels, other.exact) == (case.kernels, case.exact)]
    able = [name for name in alike if target in CASES[name].targets]
    return able[-1 if target == "sm_100" else 0]


def read() -> Record:
    """The entries of the installed Triton."""
    return {line["key"]: _entry(line) for line in _lines() if line["triton"] == triton.__version__}


def write(record: Record) -> None:
    """Replaces the entries of the installed Triton."""
    lines = [line for line in _lines() if line["triton"] != triton.__version__]
    for key, used in record.items():
        fields = {**asdict(used), "target": used.target.name}
        lines.append({"triton": triton.__version__, **fields, "key": key})
    texts = sorted(json.dumps(line) for line in lines)
    # Whole at any time, also if this process is ended here.
    written = RECORD.with_suffix(".written")
    written.write_text("".join(f"{text}\n" for text in texts))
    written.replace(RECORD)


def recorded(name: str, target_name: str, record: Mapping[str, Resources]) -> Record | None:
    """What the kernels of a case take by the record, which costs its launches; None if any would have to be compiled."""
    try:
        return launch(name, target_name, record, compiling=False)
    except NotRecorded:
        return None


def compile_case(name: str, target_name: str) -> Record:
    """What the kernels of one case take, all of them compiled; runs in a worker process."""
    return launch(name, target_name, {}, compiling=True)


def complete_case(name: str, target_name: str) -> Record:
    """The same, with what is in the record taken from there."""
    return launch(name, target_name, read(), compiling=True)


def launch(name: str, target_name: str, record: Mapping[str, Resources], compiling: bool) -> Record:
    """Runs the launchers of one case; kernels that are not in `record` are compiled, or `NotRecorded` is raised."""
    target, case = TARGETS[target_name], CASES[name]
    used: Record = {}
    with fake_driver.fake_driver(target) as fake:
        compiler = triton.compiler.compile

        def look_up(source: Any, **kwargs: Any) -> Any:
            key = key_of(source, target, kwargs["options"], case.overlapped)
            if key in record:
                fake.launched.add(source.fn)
                used[key] = record[key]
                return MagicMock()
            if not compiling:
                fake.launched.add(source.fn)
                raise NotRecorded
            kernel = compiler(source, **kwargs)
            used[key] = resources.resources(kernel, target, remarks=case.overlapped)
            return kernel

        with patch.object(triton.compiler, "compile", look_up):
            case.launch()
    return used


def key_of(source: Any, target: Target, options: Mapping[str, Any], remarks: bool) -> str:
    """A hash of all that the binary of an `ASTSource`, and what is read of it, follow from."""
    backend = make_backend(target.gpu)
    parts = (
        triton.__version__,
        backend.hash(),
        backend.parse_options(dict(options)).hash(),
        sorted(get_cache_invalidating_env_vars().items()),
        _source_key(source.fn),
        sorted(source.signature.items()),
        sorted((path, _constant(value)) for path, value in source.constants.items()),
        sorted(source.attrs.items()),
        MEASURED,
        remarks,
    )
    return _hash(str(parts))


class _Own(DependenciesFinder):
    """Finds what a kernel calls as Triton does; its hash is that of the kernel's own text, wherever in a file it stands."""

    def __init__(self, function: JITCallable) -> None:
        nonlocals = inspect.getclosurevars(function.fn).nonlocals
        super().__init__(name=function._fn_name, globals=function.__globals__, nonlocals=nonlocals, src=function.src)
        self.called: list[JITCallable] = []
        self.visit(function.parse())
        values = sorted((name, str(value)) for (name, _), (value, _) in self.used_global_vals.items())
        self.text = f"{function._fn_name} {getattr(function, 'noinline', False)} {self.ret} {values}"

    def _update_hash(self, func: JITCallable) -> None:
        self.called.append(func)
        self.hasher.update(func._fn_name.encode())


@functools.cache
def _source_key(function: JITCallable) -> str:
    """A hash of the source of a kernel, of all that it calls, itself too, and of the constants that these read."""
    reached, ahead = {function: _Own(function)}, [function]
    while ahead:
        for called in reached[ahead.pop()].called:
            if called not in reached:
                reached[called] = _Own(called)
                ahead.append(called)
    return _hash(str(sorted(own.text for own in reached.values())))


def _constant(value: Any) -> str:
    """A compile-time argument; functions among them by what they do."""
    if isinstance(value, JITCallable):
        return _source_key(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    return str(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def _entry(line: Mapping[str, Any]) -> Resources:
    fields = {name: value for name, value in line.items() if name not in ("key", "triton")}
    return Resources(**{**fields, "target": TARGETS[line["target"]], "serialised": tuple(line["serialised"])})


def completed(cases: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], Record | BaseException]]:
    """What the kernels of each case take, as they are compiled side by side, or why a case does not compile."""
    left = dict.fromkeys(cases)
    for case, found in _side_by_side(cases, os.cpu_count()):
        # The compiler may abort its process, which ends all that are under way.
        if not isinstance(found, BrokenProcessPool):
            del left[case]
            yield case, found
    for case in left:
        yield from _side_by_side([case], 1)


def _side_by_side(
    cases: list[tuple[str, str]], processes: int | None
) -> Iterator[tuple[tuple[str, str], Record | BaseException]]:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(complete_case, *case): case for case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        finally:
            # Cut off, it ends with the cases that are under way.
            pool.shutdown(cancel_futures=True)


def main(wanted: str) -> int:
    """Brings the record up to date with what `chosen` gives; 1 if a case does not compile."""
    known, asked, missing, failed = read(), Record(), [], 0
    for case in chosen(wanted):
        found = recorded(*case, known)
        if found is None:
            missing.append(case)
        else:
            asked |= found
    for done, (case, found) in enumerate(completed(missing), 1):
        if isinstance(found, BaseException):
            failed += 1
            print(f"{case} does not compile: {found!r}", file=sys.stderr)
        else:
            asked |= found
            # A run that is cut off has not been for nothing.
            write(known | asked)
        print(f"{done} of {len(missing)} cases compiled", flush=True)
    new, unasked = len(asked.keys() - known.keys()), len(known.keys() - asked.keys())
    if not failed:
        write(asked)
    print(f"Triton {triton.__version__}: {len(asked)} kernels, {new} new, {0 if failed else unasked} forgotten")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(os.environ.get("FASTATTN_TARGETS", "")))
