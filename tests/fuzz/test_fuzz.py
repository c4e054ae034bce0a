"""Random programs of `generate()`: fixed ones, and some that are new every day."""

from __future__ import annotations

import datetime
import json
import time

import pytest

from tests.fuzz.draw import draw
from tests.fuzz.run import is_excused, run_program
from tests.fuzz.shrink import as_line, shrink

FIXED = range(40)
NEW = 8
pytest.importorskip("peft")


def check(seed: int) -> None:
    """The program of a seed shows no difference."""
    program = draw(seed)
    result = run_program(program)
    if result.problem is not None and not is_excused(program):
        smaller = shrink(program, seconds=60)
        pytest.fail(f"python -m tests.fuzz --seed {seed} --programs 1\n{result.problem}\n{as_line(smaller)}", pytrace=False)


@pytest.mark.parametrize("seed", FIXED)
def test_fixed_programs(seed: int) -> None:
    check(seed)


def test_programs_of_the_day(request: pytest.FixtureRequest) -> None:
    """Their first seed is the date."""
    programs = request.config.getoption("--programs", None)
    end = time.monotonic() + 60 * request.config.getoption("--minutes", 60.0)
    first = 100 * int(datetime.date.today().strftime("%Y%m%d"))
    for seed in range(first, first + (NEW if programs is None else programs)):
        if time.monotonic() > end:
            break
        check(seed)


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is a little off shows, and what has nothing to do with it goes."""
    from hf_fastattn.cache.batch import Batch

    attend = Batch.attend
    monkeypatch.setattr(Batch, "attend", lambda self, *args, **kwargs: 1.05 * attend(self, *args, **kwargs))
    step = {"do": "generate", "prompt": {"rows": 2, "length": 9, "seed": 1, "pad": "left"}, "seed": 1}
    wishes = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    program = {"family": "qwen2", "dtype": "float32", "over": {}, "patch": {"page_size": 4}, "steps": [
        {"do": "repatch", "unpatched": False}, {**step, "with": wishes, "streamer": "collect"},
    ]}  # fmt: skip
    assert run_program(program).problem is not None
    smaller = shrink(program, seconds=30)
    assert len(smaller["steps"]) == 1 and "streamer" not in smaller["steps"][0]
    assert "repetition_penalty" not in smaller["steps"][0]["with"]
    assert run_program(json.loads(json.dumps(smaller))).problem is not None
