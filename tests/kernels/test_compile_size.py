"""How much there is to compile of the kernels that a first call waits for longest, in counts: no load changes them.

Triton's coalescing pass follows, for each load and store of a block, all that is computed from the same values: its time
grows with their number times the square of that of operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import triton
from triton._C.libtriton import ir
from triton.compiler import make_backend

from hf_fastattn.kernels.attention import workspace
from tests.kernels.compile_launches import chosen, shared_prefix
from tests.tools.fake_driver import fake_driver
from tests.tools.targets import TARGETS

TARGET = TARGETS["sm_90"]


@dataclass(frozen=True)
class Size:
    """Of a kernel as its compiler's passes first see it: operations, loads and stores of blocks."""

    operations: int
    blocks: int


def size_of(source: Any, options: dict[str, Any]) -> Size:
    backend = make_backend(TARGET.gpu)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, parsed, source.language)
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(TARGET.gpu, parsed, functions, backend.get_module_map(), context)
    text = str(next(iter(stages.values()))(module, {}))
    return Size(
        operations=len(re.findall(r"^\s+(?:%\S+ = )?\"?(?:tt|ttg|ttng|arith|math|scf)\.(?!constant)", text, re.M)),
        blocks=len(re.findall(r"tt\.(?:load|store) .*tensor<[^!]*!tt\.ptr", text)),
    )


def sizes(launch: Callable[[], object]) -> dict[str, Size]:
    """Of every kernel of a launch, by its name."""
    found = {}
    with fake_driver(TARGET) as fake:

        def noted(source: Any, options: dict[str, Any], **kwargs: Any) -> MagicMock:
            fake.launched.add(source.fn)
            found[source.fn.__name__] = size_of(source, options)
            return MagicMock()

        with patch.object(triton.compiler, "compile", noted):
            launch()
    return found


@contextmanager
def on_gpu() -> Iterator[None]:
    """As on a GPU of 132 multiprocessors, where tiles depend on them."""
    with patch.object(workspace, "INTERPRETED_PROCESSORS", 132):
        yield


# A first call of 64 samples of 8 prompts. With a load for each partial state, in an unrolled loop, the second launch of
# shared prefixes had 985 operations and 44 blocks.
@pytest.mark.parametrize(
    ("launch", "bounds"),
    [
        pytest.param(
            lambda: shared_prefix(2, 128, rows=64, groups=8, most=8, columns=64),
            {"prefixes_kernel": Size(450, 20), "suffix_kernel": Size(450, 18)},
            id="shared prefixes",
        ),
        pytest.param(
            lambda: chosen(rows=64, vocab=151936),
            {"scan_logits_kernel": Size(600, 16), "draw_kernel": Size(1150, 20)},
            id="drawing",
        ),
    ],
)
def test_what_there_is_to_compile_is_bounded(launch: Callable[[], object], bounds: dict[str, Size]) -> None:
    with on_gpu():
        found = sizes(launch)
    assert found.keys() == bounds.keys()
    for name, most in bounds.items():
        assert 0 < found[name].operations <= most.operations, (name, found[name])
        assert 0 < found[name].blocks <= most.blocks, (name, found[name])
