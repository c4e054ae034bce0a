"""Which releases this environment has, against those that `constraints.txt` pins and those that the package index offers.

Exits with status 1 where the index has something newer than a pin and it was not installed: a run of the tests would then
say nothing about it.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft")


def pinned(package: str, constraints: str) -> Version:
    """The version that the constraints pin.

    Raises:
        LookupError: they pin none.
    """
    found = re.search(rf"^{package}==([^\s;]+)", constraints, re.MULTILINE)
    if found is None:
        raise LookupError(f"constraints.txt pins no {package}")
    return Version(found[1])


def offered(package: str) -> Version:
    """The newest release that pip would install here."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Version(answer.partition("(")[2].partition(")")[0])


def main() -> int:
    """Print a line a package; the exit status."""
    constraints = (Path(__file__).parent.parent / "constraints.txt").read_text()
    missed = []
    for package in PACKAGES:
        have, pin, newest = Version(importlib.metadata.version(package)), pinned(package, constraints), offered(package)
        print(f"{package:<14}installed {have!s:<14}pinned {pin!s:<14}offered {newest}")
        if have.base_version == pin.base_version and newest > pin and newest.base_version != pin.base_version:
            missed.append(package)
    if missed:
        print(f"newer releases are offered but not installed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
