"""The end of a decode step on the device: the tokens that were chosen become the inputs of the next step.

One launch does what a host loop would do between two steps: padding tokens for finished rows, the test for end tokens,
positions, lengths, and for each page table the slot (`page * P + offset`) where the next key goes. So a recorded step can
be replayed without the host. The plain PyTorch version is `advance_reference.advance`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.loop_tensors import ABSENT, FINISHED_BIT, MOST_ENDS, MOST_ROWS, LoopTensors


@triton.jit(do_not_specialize=["rows", "stride_slots", "stride_table"])
def advance_kernel(
    chosen_ptr, packed_ptr, tokens_ptr, positions_ptr, finished_ptr, limits_ptr, seq_lens_ptr, slots_ptr, tables_ptr,
    step_ptr, ends_ptr, pad_ptr, drop_ptr, seen_ptr, rows, vocabulary, columns, stride_slots, stride_table,
    WINDOWS: tl.constexpr, PAGE: tl.constexpr, ENDS: tl.constexpr, ENDED: tl.constexpr, ABSENT: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All rows in one program; every block is `[BLOCK]`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK)
    ok = row < rows
    finished = tl.load(finished_ptr + row, mask=ok, other=1)
    token = tl.load(chosen_ptr + row, mask=ok, other=0)
    token = tl.where(finished != 0, tl.load(pad_ptr), token)
    for number in tl.static_range(ENDS):
        finished = tl.where((finished == 0) & (token == tl.load(ends_ptr + number)), 1, finished)
    step = tl.load(step_ptr) + 1
    finished = tl.where((finished == 0) & (step >= tl.load(limits_ptr + row, mask=ok, other=0)), 1, finished)
    tl.store(tokens_ptr + row, token, mask=ok)
    tl.store(finished_ptr + row, finished, mask=ok)
    tl.store(packed_ptr + row, token + ((finished != 0).to(tl.int64) << ENDED), mask=ok)
    tl.store(positions_ptr + row, tl.load(positions_ptr + row, mask=ok, other=0) + 1, mask=ok)
    gone = (finished == ABSENT) | ((finished != 0) & (tl.load(drop_ptr) != 0))
    length = tl.load(seq_lens_ptr + row, mask=ok, other=0)
    tl.store(seq_lens_ptr + row, tl.where(gone, 0, length + 1), mask=ok)
    for window in tl.static_range(WINDOWS):
        reads = ok & (gone == 0)
        table = tables_ptr + window * stride_table + row.to(tl.int64) * columns
        page = tl.load(table + length // PAGE, mask=reads, other=0)
        tl.store(slots_ptr + window * stride_slots + row, tl.where(gone, -1, page * PAGE + length % PAGE), mask=ok)
    if seen_ptr is not None:
        known = ok & (token >= 0) & (token < vocabulary)
        tl.store(seen_ptr + row.to(tl.int64) * vocabulary + token, tl.full([BLOCK], 1, tl.uint8), mask=known)
    # Every thread has read the step above: only now may it be overwritten.
    tl.debug_barrier()
    tl.store(step_ptr, step)


def advance(state: LoopTensors, page_size: int) -> None:
    """Make the chosen tokens the next inputs; see `LoopTensors`.

    Args:
        state: changed in place.
        page_size: tokens a page (P).

    Raises:
        ValueError: there are more rows or end tokens than the kernel takes.
    """
    rows = state.chosen.shape[0]
    if rows > MOST_ROWS or state.ends.shape != (MOST_ENDS,):
        raise ValueError(
            f"chosen {tuple(state.chosen.shape)} and ends {tuple(state.ends.shape)} must be [B] with B up to {MOST_ROWS} "
            f"and {[MOST_ENDS]}"
        )
    seen, tables = state.seen, state.tables
    overlap = overlaps_launches(arch_of(state.chosen.device))
    block = power_of_2(rows)
    with on_device_of(state.chosen):
        prepared(advance_kernel)[(1,)](
            state.chosen, state.packed, state.tokens, state.positions, state.finished, state.limits, state.seq_lens,
            state.slots, tables, state.step, state.ends, state.pad, state.drop, seen, rows,
            0 if seen is None else seen.shape[1], tables.shape[2], state.slots.stride(0), tables.stride(0),
            WINDOWS=tables.shape[0], PAGE=page_size, ENDS=MOST_ENDS, ENDED=FINISHED_BIT, ABSENT=ABSENT,
            BLOCK=block, OVERLAP=overlap, num_warps=min(max(block // 32, 1), 8), **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
