"""Every kernel compiled for every GPU by its own launcher, without one: no spills, and enough programs a multiprocessor.

Kernels that are as they were when the record was made (`compile_record.py`) are not compiled again.
"""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from triton.runtime import JITFunction

from hf_fastattn.kernels.variants import device_functions
from tests.kernels.compile_cases import CASES
from tests.kernels.compile_record import chosen, compile_case, complete_case, read, recorded
from tests.tools.resources import Resources

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "eval/kernel_speed")
WORKERS = 2
WANTED = os.environ.get("FASTATTN_TARGETS", "")


# Compiled anew in every run, so that the record is known to be true: Triton and Gluon, every target, fp32, 8 bits, spills.
ANEW = (
    ("append, qk-norm", "sm_90"),
    ("decode, fp32", "sm_90"),
    ("decode, fp8", "sm_90"),
    ("decode, 16 tokens, fp8", "sm_90"),
    ("experts, 128 tokens, Hopper", "sm_90"),
    ("merge", "sm_80"),
    ("merge", "sm_100"),
)


@pytest.fixture(scope="module")
def aside() -> Iterator[ProcessPoolExecutor]:
    """Compiles in processes of their own: the compiler may abort them."""
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, aside: ProcessPoolExecutor) -> Callable[[str, str], list[Resources]]:
    """What the kernels of a case take on a target: by the record, else worker processes compile the selected cases ahead."""
    record, ahead = read(), {}
    # Under pytest-xdist the session's list is that of all workers.
    items = [] if hasattr(request.config, "workerinput") else request.session.items
    for item in items:
        # Other modules may have a fixture of this name.
        if getattr(item, "module", None) is request.module and "compiled" in item.fixturenames:
            case = item.callspec.params["name"], item.callspec.params["target"]
            if recorded(*case, record) is None:
                ahead[case] = aside.submit(complete_case, *case)

    def of(name: str, target: str) -> list[Resources]:
        case = name, target
        found = None if case in ahead else recorded(*case, record)
        if found is None:
            warnings.warn("kernels that are not on record are compiled, which takes long: see `make record`", stacklevel=2)
            found = (ahead.get(case) or aside.submit(complete_case, *case)).result()
        return list(found.values())

    return of


@pytest.mark.parametrize(("name", "target"), list(chosen(WANTED)))
def test_compiles(compiled: Callable[[str, str], list[Resources]], name: str, target: str) -> None:
    case = CASES[name]
    kernels = compiled(name, target)
    assert {used.kernel for used in kernels} == set(case.kernels)
    for used in kernels:
        assert used.spilled_bytes <= case.spilled, used
        assert used.programs_per_processor >= case.programs, used
        assert not (case.overlapped and used.serialised), used
        assert not (case.exact and used.uses_tf32), "fp32 products in TF32: pass an input_precision"


@pytest.mark.parametrize(("name", "target"), ANEW)
def test_the_record_is_true(aside: ProcessPoolExecutor, name: str, target: str) -> None:
    record = read()
    for key, used in aside.submit(compile_case, name, target).result().items():
        assert record.get(key, used) == used


def jit_functions() -> dict[str, JITFunction]:
    found = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(f"hf_fastattn.{name}")
        found.update({name: value for name, value in vars(module).items() if isinstance(value, JITFunction)})
    return found


def test_every_kernel_has_a_case() -> None:
    functions = jit_functions()
    named = {node.id for function in functions.values() for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
    # What other kernels call is compiled with them; generated code calls the functions of this module.
    named |= set(vars(device_functions))
    kernels = {name for name in functions if name not in named}
    assert kernels == {kernel for case in CASES.values() for kernel in case.kernels}
