"""What a record says of the code that made it."""

from __future__ import annotations

from pathlib import Path

import hf_fastattn
from hf_fastattn.eval.reporting.environment import sources


def test_every_file_that_computes_is_hashed_once() -> None:
    names = list(sources())
    assert len(set(names)) == len(names) and len({path.resolve() for path in sources().values()}) == len(names)
    for name in ("runtime.py", "cache/batch.py", "kernels/attention/decode.py", "patches/families/llama.py"):
        assert name in names and (Path(hf_fastattn.__file__).parent / name).exists()
    assert not [name for name in names if name.startswith("eval/")]
