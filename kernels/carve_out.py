"""How a multiprocessor's memory is divided between L1 cache and shared memory while a kernel runs.

By default it stays as the kernel before left it, if that is enough. A kernel that reads the same few numbers in every
program needs them in the L1 cache: a layer of an 8B model with four rows of 600 keys takes 173 us where attention, ahead of
the products, has left nearly all as shared memory, and 132 with the L1 cache that these ask for (H200).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

logger = logging.getLogger("hf_fastattn")

# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, of CUDA's driver.
PREFERRED_CARVE_OUT = 9


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        logger.debug("hf_fastattn cannot ask for L1 cache: %s", error)
        return None


def prefer_shared_memory(function: int, percent: int) -> None:
    """Ask for a division for all later launches of a loaded kernel; without CUDA's driver library nothing is done.

    Args:
        function: its handle, as Triton holds it.
        percent: of the memory to be shared memory, from 0, as little as the kernel needs, to 100.
    """
    driver = _driver()
    if driver is not None:
        found = driver.cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_CARVE_OUT, percent)
        if found:
            logger.debug("hf_fastattn asked for L1 cache: CUDA's error %d", found)
