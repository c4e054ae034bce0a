"""What an evaluation ran on: versions, device and settings; nothing that names a machine or a person."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import hf_fastattn

PACKAGE = Path(hf_fastattn.__file__).resolve().parent


def environment(device: str | torch.device) -> dict[str, str]:
    """Versions of what computes, the commit if this is a clone, and the device's name."""
    found = {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "datasets")},
        "hf_fastattn": hf_fastattn.__version__,
        "commit": _commit(),
        "source": source_hash(),
        "device": _device(torch.device(device)),
    }
    return {name: value for name, value in found.items() if value}


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def command(module: str, arguments: list[str]) -> str:
    """The command line as it would be typed, with absolute paths cut to their last part."""
    words = [re.sub(r"^(--[\w-]+=)?/.*/([^/]+)$", r"\1\2", word) for word in arguments]
    return " ".join(["python", "-m", module, *words])


def sources() -> dict[str, Path]:
    """The files of the code that computes, by their names below the package; links count as what they lead to."""
    found = {}
    for folder in ("", "kernels", "patches"):
        base = (PACKAGE / folder).resolve()
        for path in base.rglob("*.py"):
            found[(Path(folder) / path.relative_to(base)).as_posix()] = path
    return {name: path for name, path in sorted(found.items()) if not name.startswith("eval/")}


def source_hash() -> str:
    """A short hash of the code that computes, so that a result is never taken for one of other code."""
    digest = hashlib.sha256()
    for name, path in sources().items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def settings_hash(settings: dict[str, Any]) -> str:
    """A short hash of settings that JSON can write, independent of their order."""
    import json

    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads: {torch.get_num_threads()}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}, modified" if commit and git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.TimeoutExpired):
        return ""
