"""A trial of the Gluon prefill with a version of Triton that it was not tested with, in a process of its own.

Gluon changes from release to release. A kernel that does not compile can end its process, and one that compiles can hang
or be wrong; so a child compiles it and compares it with PyTorch, and the outcome is kept on disk for the version, the
GPU and the kernel's source.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SECONDS = 300.0
WRONG, FAILED, NO_DEVICE = 3, 4, 5
_OUTCOMES = {0: "right", WRONG: "wrong results", FAILED: "an error"}
SOURCES = (
    "hopper_prefill.py",
    "hopper_roles.py",
    "hopper_items.py",
    "hopper_softmax.py",
    "hopper_registers.py",
    "../gluon_spelling.py",
    "work_list.py",
    "hopper_trial.py",
)
# New and past tokens of the rows: one of several tiles, one of few tokens, one that ends inside a page.
COUNTS, PASTS = (300, 3, 129), (0, 260, 70)
PAGE, GROUPS, RATIO = 16, 2, 4
DIMS = (64, 128, 256)


def why_not_trusted(version: str, device: torch.device, seconds: float | None = None) -> str | None:
    """What went wrong in the trial of this version of Triton on `device`; None if the results were right."""
    kept = _kept_outcome(version, torch.cuda.get_device_name(device))
    outcome = _read(kept) or _run(_command(device), seconds or SECONDS, kept)
    return None if outcome == _OUTCOMES[0] else outcome


def _kept_outcome(version: str, gpu: str) -> Path:
    digest = hashlib.sha256(f"{version}\0{gpu}\0{torch.__version__}".encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "hf_fastattn" / f"hopper-trial-{digest.hexdigest()[:20]}.txt"


def _read(kept: Path) -> str | None:
    try:
        return kept.read_text().strip() or None
    except OSError:
        # No outcome was kept, or the folder cannot be read: the trial runs.
        return None


def _keep(kept: Path, outcome: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(outcome)
        os.replace(file.name, kept)
    except OSError:
        # The folder cannot be written: the next process runs the trial again.
        return


def _command(device: torch.device) -> list[str]:
    return [sys.executable, "-m", "hf_fastattn.kernels.attention.hopper_trial", str(device.index or 0)]


def _run(command: list[str], seconds: float, kept: Path) -> str:
    """The outcome of the trial, kept on disk unless the trial could not start (memory, access to the GPU)."""
    package = str(Path(__file__).absolute().parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        status = subprocess.run(
            command, env=environment, timeout=seconds,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        outcome = f"no end within {seconds:.0f} seconds"
    except OSError as error:
        return f"no process to try it in ({error})"
    else:
        if status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT) or status not in _OUTCOMES and status >= 0:
            return f"no start of the trial, for want of memory or of access to the GPU (exit status {status})"
        outcome = _OUTCOMES.get(status) or f"a crash (signal {-status})"
    _keep(kept, outcome)
    return outcome


def _batch(dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, pages of keys and of values, and a shuffled page table; slots without a token are NaN."""
    torch.manual_seed(dim)
    columns = max(-(-(count + past) // PAGE) for count, past in zip(COUNTS, PASTS, strict=True))
    table = torch.randperm(len(COUNTS) * columns, device=device).view(len(COUNTS), columns)
    pages = torch.full((2, table.numel(), PAGE, GROUPS, dim), float("nan"), device=device, dtype=torch.bfloat16)
    for row, (count, past) in enumerate(zip(COUNTS, PASTS, strict=True)):
        position = torch.arange(count + past, device=device)
        page, slot = table[row, position // PAGE], position % PAGE
        pages[:, page, slot] = torch.randn(2, count + past, GROUPS, dim, device=device).to(pages.dtype)
    q = torch.randn(sum(COUNTS), GROUPS * RATIO, dim, device=device).to(pages.dtype)
    return q, pages[0], pages[1], table


def _expected(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> Tensor:
    """Plain attention in fp32, row by row."""
    rows = []
    for new, count, past, pages in zip(q.float().split(COUNTS), COUNTS, PASTS, table, strict=True):
        k, v = (x[pages].flatten(0, 1)[: count + past].float().repeat_interleave(RATIO, 1) for x in (k_pages, v_pages))
        scores = torch.einsum("shd,lhd->hsl", new, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(count, count + past, dtype=torch.bool, device=q.device).triu(past + 1)
        rows.append(torch.einsum("hsl,lhd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(rows)


def _is_right(dim: int, device: torch.device) -> bool:
    from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

    q, k_pages, v_pages, table = _batch(dim, device)
    begins = torch.tensor((0, *COUNTS), device=device).cumsum(0).int()
    lengths = torch.tensor(COUNTS, device=device).add(torch.tensor(PASTS, device=device)).int()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    batch = (table.int(), begins, lengths)
    out, _ = hopper_prefill(q, k_pages, v_pages, *batch, scale=dim**-0.5, processors=processors)
    # The limit is a few bf16 roundings of weights and outputs, which are averages of normal values.
    return bool(((out.float() - _expected(q, k_pages, v_pages, table)).abs() < 0.03).all())


def main(index: int) -> int:
    """Exit status of the trial on GPU `index`."""
    device = torch.device("cuda", index)
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError):
        # A PyTorch built without CUDA raises AssertionError.
        return NO_DEVICE
    try:
        return 0 if all(_is_right(dim, device) for dim in DIMS) else WRONG
    except torch.cuda.OutOfMemoryError:
        return NO_DEVICE
    except Exception:
        # A compiler may raise anything; whatever it is, this version cannot be used.
        return FAILED


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
