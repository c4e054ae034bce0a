"""Several processes of one group, with gloo on the CPU, or with NCCL on a GPU each: functions run in all of them at once."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

# Seconds within which a function has to return.
PATIENCE = 90.0


class Processes:
    """`count` processes that wait for functions to run, until `close()`; what they write to stderr goes to a file."""

    def __init__(self, count: int, errors: str, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once, by the process that all others are forked from.
        context.set_forkserver_preload(["tests.parallel.ranks"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, port, theirs, errors, backend), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function, of a module, gives in each process; an exception there is a RuntimeError here."""
        self.send(function, *args)
        results = [self.receive(rank) for rank in range(len(self.connections))]
        errors = [result for result in results if isinstance(result, Failure)]
        if errors:
            raise RuntimeError("\n".join(error.trace for error in errors))
        return results

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the function run in each process."""
        for connection in self.connections:
            connection.send((function, args))

    def receive(self, rank: int, patience: float = PATIENCE) -> Any:
        """What it gave there, or a `Failure`; None if the process has ended."""
        connection = self.connections[rank]
        if not connection.poll(patience):
            raise TimeoutError(f"rank {rank} has not answered for {patience} s")
        try:
            return connection.recv()
        except EOFError:
            return None

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.join()


class Failure:
    """An exception in a process."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.text = type(error).__name__, str(error)
        self.trace = "".join(traceback.format_exception(error))


@contextmanager
def processes(count: int = 2, errors: str = os.devnull, backend: str = "gloo") -> Iterator[Processes]:
    """Processes for the length of a `with` block."""
    started = Processes(count, errors, backend)
    try:
        yield started
    finally:
        started.close()


def _serve(rank: int, count: int, port: int, connection: Connection, errors: str, backend: str) -> None:
    # That of the process which all are forked from may be closed by now.
    with open(errors, "a", buffering=1) as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    bound: dict[str, Any] = {}
    if backend == "nccl":
        torch.cuda.set_device(rank)
        bound["device_id"] = torch.device("cuda", rank)
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group(backend, rank=rank, world_size=count, timeout=patience, **bound)
    while True:
        function, args = connection.recv()
        try:
            connection.send(function(*args))
        except BaseException as error:
            connection.send(Failure(error))
