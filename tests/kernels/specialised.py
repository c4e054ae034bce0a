"""How many specialisations of each kernel the tests of this process have compiled on the first GPU."""

from __future__ import annotations

from collections import Counter

from tests.kernels.test_compile import jit_functions

BY_TESTS: Counter[str] = Counter()
# Of those whose names begin with `test_sweep`.
BY_SWEEPS: Counter[str] = Counter()


def specialisations() -> dict[str, int]:
    return {
        name: sum(len(cache[0]) for device, cache in function.device_caches.items() if device == 0)
        for name, function in jit_functions().items()
    }
