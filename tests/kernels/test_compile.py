"""Every kernel compiled for every GPU by its own launcher, without one: no spills, and enough programs a multiprocessor."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from triton.runtime import JITFunction

from tests.kernels.compile_cases import CASES, compile_case
from tests.triton_tools.resources import Resources

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
WORKERS = 2
# ptxas spills a few bytes outside the loops now and then; that costs nothing.
SPILLED_BYTES = 32


@pytest.fixture(scope="module")
def pending(request: pytest.FixtureRequest) -> Iterator[dict]:
    """The selected cases, compiled ahead by worker processes."""
    chosen = [item.callspec.params for item in request.session.items if "pending" in getattr(item, "fixturenames", ())]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        yield {(case["name"], case["target"]): pool.submit(compile_case, case["name"], case["target"]) for case in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in CASES for target in CASES[name].targets])
def test_compiles(pending: dict[tuple[str, str], Future[list[Resources]]], name: str, target: str) -> None:
    case, compiled = CASES[name], pending[name, target].result()
    assert {used.kernel for used in compiled} == set(case.kernels)
    for used in compiled:
        assert used.spilled_bytes <= SPILLED_BYTES, used
        assert used.programs_per_processor >= case.programs, used
        assert not (case.exact and used.uses_tf32), "fp32 products in TF32: pass input_precision='ieee'"


def jit_functions() -> dict[str, JITFunction]:
    found = {}
    for path in KERNELS.glob("*.py"):
        module = importlib.import_module(f"hf_fastattn.kernels.{path.stem}")
        found.update({name: value for name, value in vars(module).items() if isinstance(value, JITFunction)})
    return found


def test_every_kernel_has_a_case() -> None:
    functions = jit_functions()
    named = {node.id for function in functions.values() for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
    # What other kernels call is compiled with them.
    kernels = {name for name in functions if name not in named}
    assert kernels == {kernel for case in CASES.values() for kernel in case.kernels}
