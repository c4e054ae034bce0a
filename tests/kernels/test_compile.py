"""Every kernel compiled for every GPU by its own launcher, without one: no spills, and enough programs a multiprocessor."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from triton.runtime import JITFunction

from hf_fastattn.kernels.variants import device_functions
from tests.kernels.compile_cases import CASES, SPILLED_BYTES, Case, compile_case
from tests.tools.resources import Resources

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "eval/kernel_speed")
WORKERS = 2
WANTED = os.environ.get("FASTATTN_TARGETS", "")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], list[Resources]]]:
    """What the kernels of a case take on a target; worker processes compile the selected cases ahead."""
    # Other modules may have a fixture of this name.
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    chosen = [item.callspec.params for item in items if "compiled" in item.fixturenames]
    if hasattr(request.config, "workerinput"):
        # Under pytest-xdist the list is that of all workers.
        chosen = []
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        pending = {(case["name"], case["target"]): pool.submit(compile_case, *case.values()) for case in chosen}
        yield lambda name, target: (pending.get((name, target)) or pool.submit(compile_case, name, target)).result()
        pool.shutdown(cancel_futures=True)


def chosen() -> Iterator[tuple[str, str]]:
    """Every case for sm_90, and for each other target one of the same kernels and precision.

    With FASTATTN_TARGETS=all every case for every target; with `few` one of the same kernels and precision for sm_90, and
    those whose registers are taken to the last, which is where compilers differ.
    """
    for name, case in CASES.items():
        for target in case.targets:
            one, hopper = name == representative(case, target), target == "sm_90"
            if WANTED == "few":
                wanted = hopper and (one or case.overlapped or case.spilled != SPILLED_BYTES)
            else:
                wanted = hopper or one or WANTED == "all"
            if wanted:
                yield name, target


def representative(case: Case, target: str) -> str:
    """The case of the kernels and precision of `case` that stands for them: for sm_100 another one than for the others."""
    alike = [name for name, other in CASES.items() if (other.kernels, other.exact) == (case.kernels, case.exact)]
    able = [name for name in alike if target in CASES[name].targets]
    return able[-1 if target == "sm_100" else 0]


@pytest.mark.parametrize(("name", "target"), list(chosen()))
def test_compiles(compiled: Callable[[str, str], list[Resources]], name: str, target: str) -> None:
    case = CASES[name]
    kernels = compiled(name, target)
    assert {used.kernel for used in kernels} == set(case.kernels)
    for used in kernels:
        assert used.spilled_bytes <= case.spilled, used
        assert used.programs_per_processor >= case.programs, used
        assert not (case.overlapped and used.serialised), used
        assert not (case.exact and used.uses_tf32), "fp32 products in TF32: pass an input_precision"


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
