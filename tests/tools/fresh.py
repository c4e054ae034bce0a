"""Python where nothing of ours was imported yet; PyTorch and Transformers were, once for all tests of a process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Answers each line, which is a piece of code, from a fork of its own: its exit status, what it printed, and its errors.
SERVER = """
import json, os, sys, tempfile, traceback
import torch, transformers
from transformers import LlamaForCausalLM

def child(code, files):
    for stream, file in zip((1, 2), files):
        os.dup2(file.fileno(), stream)
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

assert "hf_fastattn" not in sys.modules
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        fork = os.fork()
        if not fork:
            child(json.loads(line), (out, errors))
        status = os.waitpid(fork, 0)[1]
        for file in (out, errors):
            file.seek(0)
        print(json.dumps([status, out.read(), errors.read()]), flush=True)
"""


def fresh(code: str) -> str:
    """What `code` prints, run in the repository's root."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(code) + "\n")
    server.stdin.flush()
    status, said, errors = json.loads(server.stdout.readline())
    assert status == 0, errors
    return said.strip()


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends when its input does, with this process."""
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
